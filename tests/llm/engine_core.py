"""Run a model in vLLM with the engine core in a process of its own, as on several GPUs, generating without end.

There, the core has a process for each GPU in addition. Killing the core is the same, and its start takes half as long.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from persyn.llm.chat import Chat, load_tokenizer
from persyn.llm.protocols import Generate, ModelSpec, Sampling
from persyn.llm.teachers import generation
from persyn.llm.teachers.vllm_engine import Readers, VllmEngine


def main(folder: Path) -> None:
    os.environ |= {
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    }
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    from vllm import LLM

    llm = LLM(str(folder), kv_cache_memory_bytes=2**27, enforce_eager=True, max_num_seqs=2)
    chat = Chat(load_tokenizer(ModelSpec("vllm", str(folder))))
    engine = VllmEngine(llm, chat, "", Readers(generation.reader(chat), None), {})
    number = 0
    while True:
        if not engine.pending:
            number += 1
            engine.submit([Generate(number, [{"role": "user", "content": "Count."}], Sampling(max_tokens=100), number)])
        engine.step()
        if number == 1:
            sys.stdout.write("writing\n")
            sys.stdout.flush()
            number += 1


if __name__ == "__main__":
    main(Path(sys.argv[1]))

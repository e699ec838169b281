"""Phrases that state answers in many languages: tables with comma-separated entries, and patterns from them."""

from __future__ import annotations

import re
from functools import cache

#: "Answer", in languages that put a verb or a colon between this word and the answer.
ANSWER = """
answer, ans, respuesta,
contestación, réponse, reponse, antwort, risposta, resposta, antwoord, svar, svaret, vastaus, răspuns,
răspunsul, raspuns, raspunsul, odpowiedź, odpowiedz, odpowiedzią, odpověď, odpoveď, odpovedí, odgovor, válasz,
απάντηση, отговор, отговорът, ответ, ответом, відповідь, адказ, одговор, sagot, jibu, erantzuna, vastus,
atsakymas, atbilde, jawaban, jawapan, jawabannya, javob, cavab, жауап, solució, resultat
"""
#: "Answer", in languages that may put nothing in between.
ANSWER_DIRECT = """
cevap, cevabı, cevabımız, yanıt, yanıtı, đáp án, đáp số, câu trả lời, trả lời, उत्तर, जवाब, উত্তর, பதில், விடை,
సమాధానం, ಉತ್ತರ, ഉത്തരം, જવાબ, ਜਵਾਬ, ਉੱਤਰ, جواب, پاسخ, الإجابة, الاجابة, إجابة, الجواب, תשובה, התשובה, ответ,
відповідь, 答案, 答え, 答, 解答, 正解, 正答, 回答, 정답, 해답, 답변, 답, คำตอบ, ចម្លើយ, ຄຳຕອບ, პასუხი, պատասխան,
vastaus on, vastus on, odpowiedź to, odpowiedź brzmi
"""
#: "Result", "total": introduces the answer if nothing is called the answer itself.
RESULT = """
result, results, total, solution, outcome, resultado, solución, résultat, ergebnis, lösung, resultat,
risultato, soluzione, totale, solução, resultaat, oplossing, totaal, lösning, tulos, rezultat, wynik,
rozwiązanie, suma, výsledek, výsledok, eredmény, megoldás, αποτέλεσμα, результат, итог, итого, всего, підсумок,
hasil, hasilnya
"""
RESULT_DIRECT = """
sonuç, sonucu, toplam, kết quả, tổng cộng, परिणाम, कुल, ফলাফল, النتيجة, المجموع, الناتج, نتیجه, התוצאה, 结果, 結果,
合計, 总共, 一共, 總共, 결과, 합계, 총, ผลลัพธ์, итого
"""
#: Before or after the word for the answer: marks the one that counts.
FINAL = """
final, finale, definitiva, définitive, endgültige, uiteindelijke, slutgiltiga, ostateczna, końcowa, konečná,
окончательный, итоговый, финальный, остаточна, nihai, son, cuối cùng, akhir, अंतिम, চূড়ান্ত, النهائية,
النهائي, نهایی, 最终, 最終, 최종
"""
#: Between the word for the answer and the answer.
LINK = """
is, are, was, equals, equal to, becomes, would be, will be, must be, should be, es, son, sería, será, est,
sont, vaut, donne, ist, sind, lautet, beträgt, ergibt, è, é, sono, seria, zijn, bedraagt, luidt, är, blir, er,
bliver, este, jest, jest to, wynosi, brzmi, je, jsou, činí, az, είναι, е, равен, равна, равно, равны,
составляет, есть, это, дорівнює, становить, là, bằng, adalah, ialah, है, हैं, هو, هي, هى, است, היא, הוא, هست
"""
LINK_JOINED = "等于, 等於, 應為, 应为, 是, 为, 為, 選, 选, には, は, が, 은, 는, 이, 가, คือ"
#: Verbs after which a sentence states a count.
COUNTING = """
has, have, had, gets, get, got, needs, need, needed, makes, make, made, earns, earn, earned, costs, cost, pays,
pay, paid, spends, spend, spent, gives, give, gave, yields, leaves, takes, take, took, sells, sold, uses, used,
receives, received, saves, saved, buys, bought, be, becomes, reaches, totals, remain, remains, contains,
weighs, tiene, hay, quedan, gana, cuesta, ont, gagne, coûte, hat, haben, kostet, verdient, tem, há, ha, costa,
ma, heeft, kost, получает, стоит, заработает, имеет, 有, 得到, 需要, 共有, 花费, 賺, 赚
"""
#: Words before a number that do not change it.
FILLER = """
about, approximately, approx., approx, around, roughly, exactly, nearly, almost, ca., ca, circa, only, just,
simply, precisely, a total of, in total, equal to, equals, now, also, still, at least, the number, the value,
aproximadamente, alrededor de, unos, unas, cerca de, environ, à peu près, exactement, ungefähr, etwa, rund,
genau, approssimativamente, ongeveer, около, примерно, приблизительно, ровно, yaklaşık, około, khoảng, लगभग,
تقريبا, حوالي, تقریبا, 大约, 大概, 约, 約, 약, ประมาณ
"""
#: Begins a reason or an aside, and thus ends the answer.
REASON = """
because, since, which, where, so, meaning, as, given, therefore, hence, thus, after, when, if, although, while,
rather than, instead of, but, porque, ya que, pues, parce que, car il, car elle, car on, car le,
car la, car les, puisque, weil, denn, perché, poiché, pois,
omdat, want het, want de, want er, потому, так как, поскольку, bo, ponieważ, çünkü, vì, क्योंकि,
لأن, 因为, 因為, 所以, なので
"""
#: Between the parts of a list.
AND = """
and, or, y, o, e, ou, et, und, oder, en, of, och, eller, og, и, или, oraz, lub, i, ve, veya, và, hoặc, dan,
atau, और, या, و, أو
"""
AND_JOINED = "和, 与, 與, 及, 或, と"
#: Revises the answer that was given before.
REVISION = """
wait, actually, correction, sorry, oops, scratch that, my mistake, on second thought, hold on, en realidad, mejor dicho,
en fait, plutôt, eigentlich, korrektur, anzi, na verdade, на самом деле, вернее, точнее
"""
REVISION_JOINED = "实际上, 不对, 更正, 訂正, 아니"
#: Says that the named thing is not the answer.
NOT = """
not, isn't, never, nor, neither, cannot, wrong, incorrect, false, nicht, kein, keine, falsch, pas, incorrecte,
incorrecta, falsa, falso, não, не, неверно, неправильно, ни, nie, değil, không, नहीं, ليس, לא
"""
#: Says that the number right after it is not the answer.
DENIAL = """
not, isn't, never, cannot, can't, couldn't, wasn't, nicht, kein, keine, pas, non, não, не, niet, inte, değil, không,
no
"""
DENIAL_JOINED = "不, 아니"
NOT_JOINED = "不是, 不, 错, 錯, ない, 아니"
#: Says that a choice is made; precedes its letter.
CHOOSE = """
choose, chose, choosing, pick, picked, select, selected, option, choice, alternative, opción, opcion, elijo,
alternativa, choix, choisis, wähle, opzione, scelgo, opção, escolho, optie, kies, вариант, выбираю, wariant,
opcja, wybieram, seçenek, şık, pilihan, chọn, विकल्प, الخيار
"""
CHOOSE_JOINED = "选项, 选择, 应选, 故选, 选, 選択肢, 選, 선택지, 선택, 보기"
#: May stand between such a phrase or a verb and the letter, or before the word for an option.
ARTICLE = """
the, a, la, el, le, die, der, das, il, lo, a letra, letter, lettre, letra, letera, lettera, buchstabe, буква, la letra,
la lettre, la lettera, der buchstabe, the letter, answer
"""
#: Leads from a reason to the choice, which is then the last word.
THEREFORE = """
hence, so, therefore, thus, leaves, leaving, remains, go with, going with, must be, has to be, is, it's, was, answer,
say
"""
#: Says that a choice is made; follows its letter.
CHOSEN = """
is correct, is right, is true, is best, is the correct, is the right, is the best, is the answer, is the only,
is my answer, it is, şıkkı, şıkkıdır, seçeneği, seçeneğidir,
es correcta, es la correcta, es la respuesta, est correcte, est la bonne, est la réponse,
ist richtig, ist korrekt, ist die richtige, ist die antwort, è corretta, è la risposta, está correta,
é a correta, é a resposta, верен, верно, является правильным, jest poprawna, doğru, đúng, सही
"""
CHOSEN_JOINED = "是正确, 是正確, 正确, 正確, が正解, が正しい, 이 정답, 가 정답, 입니다"

#: "Percent", after a number.
PERCENT = """
percent, per cent, pct, percentage points, por ciento, pour cent, prozent, procent, por cento, per cento,
процентов, процента
"""

#: Words that are mathematical notation.
FUNCTIONS = frozenset(
    {"sin", "cos", "tan", "cot", "sec", "csc", "log", "ln", "exp", "sqrt", "lim", "max", "min", "gcd", "lcm", "mod"}
    | {"deg", "arcsin", "arccos", "arctan", "pi", "inf", "infty"}
)

#: Texts with the same meaning, one group per paragraph.
_SAME = r"""
no solution, no solutions, no real solution, no real solutions, there is no solution, there are no solutions,
no real root, no real roots, no roots, no solution exists, no solutions exist,
no such number exists, none, none exists, there is none,
ninguna, ninguna solución, aucune, aucune solution, keine lösung, nessuna soluzione, sem solução, нет решений, 无解,
無解,
\emptyset, \varnothing, \{\}, {}, ∅, empty set

does not exist, do not exist, dne, diverges, undefined, not defined, doesn't exist, nan, not a number

infinitely many, infinitely many solutions, infinite solutions

true, yes, sí, si, oui, ja, да, sim, sì, 是, はい, 네, 예, نعم, हाँ, evet, tak, có, כן

false, no, non, nein, нет, não, nee, 否, いいえ, 아니요, لا, नहीं, hayır, nie, không, לא

\mathbb{r}, ℝ, all real numbers, all reals, any real number
"""
SAME_TEXT = tuple(frozenset(re.split(r",\s", group.strip())) for group in _SAME.split("\n\n"))
YES_OR_NO = SAME_TEXT[3] | SAME_TEXT[4]

#: Infinity, as written outside formulas.
INFINITY = """
infinity, inf, infinite, infinito, infinita, infini, infinie, unendlich, infinità, oneindig, бесконечность,
nieskończoność, sonsuz, vô cực, 无穷, 无穷大, 無限, 無限大, 무한, 무한대, ∞, \\infty
"""
PLUS = "plus, positive, positivo, positiv, плюс, 正"
MINUS = "minus, negative, negativo, negativ, menos, moins, meno, минус, 负, 負"


@cache
def entries(table: str) -> tuple[str, ...]:
    """The entries of a table, longest first."""
    return tuple(sorted({entry.strip() for entry in re.split(r"[,\n]", table)} - {""}, key=len, reverse=True))


def any_of(table: str, joined: str = "") -> str:
    """A pattern that matches the entries of `table` as whole words, and those of `joined` anywhere."""
    whole = "|".join(map(re.escape, entries(table)))
    apart = "|".join(map(re.escape, entries(joined)))
    # \b would not work: it does not treat the vowel signs of Hindi and similar scripts as letters.
    bounded = rf"(?<![^\W\d_])(?:{whole})(?![^\W\d_]|[\u0900-\u0dff])"
    return rf"(?:{bounded}|{apart})" if apart else bounded

"""Operations on whole runs and stores: rename and delete a run, copy a store."""

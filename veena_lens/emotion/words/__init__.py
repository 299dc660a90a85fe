"""Emotion words: wheels, the lexicon that finds labels in free text, and the scores of MER-UniBench."""

"""Draws faces with known emotions and trains the small checkpoints which `checkpoints/bundled` holds.

`python -m veena_lens.zoo.train --out DIR` trains, `python -m veena_lens.zoo.evaluate` writes the model card.
Drawing asks for the extra packages `python_avatars` and `resvg-py`; nothing here imports them at the top.
"""

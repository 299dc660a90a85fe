"""Draw faces with known emotions and train the small checkpoints in `checkpoints/bundled`.

`python -m veena_lens.zoo.train --out DIR` trains, `python -m veena_lens.zoo.evaluate` writes the model card. Drawing
needs the extra packages `python_avatars` and `resvg-py`, which are imported where they are used.
"""

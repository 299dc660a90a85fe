"""A forward pass, caches and attention rows against Hugging Face's forward (sdpa) on the same weights."""

from __future__ import annotations

import torch

from veena_lens.benchmarks.models import prompt, random_llava, seconds, table


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    hf, model = random_llava()
    raw = prompt()
    inputs = model.inputs_from_hf(**raw)
    with torch.no_grad():
        ours, theirs = model(inputs), hf(**raw).logits
    error = float((ours - theirs).abs().max() / theirs.abs().max())
    base = seconds(lambda: hf(**raw))
    resid = [f"blocks.{i}.hook_resid_post" for i in range(model.cfg.n_layers)]
    rows = [
        ("Hugging Face forward, sdpa", base),
        ("forward", seconds(lambda: model(inputs))),
        ("run_with_cache, every resid_post", seconds(lambda: model.run_with_cache(inputs, names_filter=resid))),
        ("run_with_cache, everything", seconds(lambda: model.run_with_cache(inputs))),
        ("attention of the last token, all layers", seconds(lambda: model.attention(inputs))),
        ("Hugging Face forward, sdpa, again", seconds(lambda: hf(**raw))),
    ]
    title = f"16 layers, d_model 512, 600 tokens (576 of a picture), float32, one thread; logits differ by {error:.1e}"
    print(table(title, rows, ("Hugging Face", base)))


if __name__ == "__main__":
    main()

"""Parts of a transformer with named hook points: norms, rotary positions, attention, MLP, blocks."""

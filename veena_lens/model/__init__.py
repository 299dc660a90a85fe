"""The model: one loop over blocks, hooks and caches around it, weights in HookedTransformer's shapes."""

"""Judge the methods: model selection on validation data, held-out evaluation, side effects."""

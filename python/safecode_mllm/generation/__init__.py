"""SafeCoDe inside your own call of `model.generate`: as `custom_generate`, as a recipe, as a logits processor."""

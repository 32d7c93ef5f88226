"""What a program costs, before and beside running it: arrays' shapes in, numbers out; no module here knows a model."""

"""Losses: arrays in, float32 scalars out; no module here knows a model, a weight or a schedule.

`pixel` l1, l2 · `adversarial` hinge, vanilla, non-saturating · `lecam` · `semantic` negative cosine and
feature matching · `perceptual` LPIPS, per image. Every mean runs over the whole array: under `jit` with a
sharded batch, the global mean.
"""

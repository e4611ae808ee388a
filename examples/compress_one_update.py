"""Compress one update: ``python examples/compress_one_update.py``."""

import numpy as np

from fedbw_sweep.compression.feedback import RESIDUAL, encode_with_feedback
from fedbw_sweep.compression.layout import Layout, TensorSpec
from fedbw_sweep.compression.sparse import TopK

# What an update is: one float32 vector, and the layout that says which arrays it is made of.
layout = Layout((TensorSpec("weight", (256, 128)), TensorSpec("bias", (256,))))
rng = np.random.default_rng(0)
update = (1e-3 * rng.standard_normal(layout.size)).astype(np.float32)

compressor = TopK(density=0.01, values="int8")
payload = compressor.encode(update, layout, rng)
decoded = compressor.decode(payload, layout)  # what the server gets: nothing but the payload

print(f"{4 * layout.size:,} bytes dense, {len(payload):,} bytes sent")
print(f"squared error over energy: {np.sum((update - decoded) ** 2) / np.sum(update**2):.3f}")
for (tensor, part), count in sorted(compressor.parts(payload, layout).items()):
    print(f"  {tensor:8} {part:8} {count:5,} B")

# Error feedback: what was not sent is added to this client's next update, so nothing is lost.
payload, state = encode_with_feedback(compressor, update, layout, rng, {})
kept = compressor.decode(payload, layout) + state[RESIDUAL]
print(f"decoded + residual differs from the update by {np.abs(kept - update).max():.1e}")

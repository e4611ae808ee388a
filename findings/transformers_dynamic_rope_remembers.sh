#!/usr/bin/env bash
# transformers 5.23.0: with dynamic rotary scaling, what a model has read changes what it says next.
#
# rope_type dynamic raises its frequencies' base for a text longer than any before, and takes it back
# only when a text is shorter than max_position_embeddings again (dynamic_frequency_update in
# transformers/modeling_rope_utils.py). A text of 48 tokens after one of 128, where the model was
# made for 32, is read with the frequencies of 128. The state is in no state_dict, so that clients
# and evaluations that share a module change each other's results.
#
# Seen: alone 0, after a longer text above 1e-05, a copy made before 0
set -euo pipefail
source "$(dirname "$0")/run_python.sh"
run_python torch==2.13.0 transformers==5.23.0 numpy==2.4.6 <<'PYTHON'
import copy

import torch
from transformers import AutoConfig, AutoModelForCausalLM

torch.manual_seed(0)
config = AutoConfig.for_model(
    "llama", vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
    num_attention_heads=2, max_position_embeddings=32,
    rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
)
model = AutoModelForCausalLM.from_config(config).eval()
untouched = copy.deepcopy(model)
short, long = (torch.arange(length)[None] % 64 for length in (48, 128))
with torch.no_grad():
    first = model(short).logits
    alone = float((model(short).logits - first).abs().max())
    model(long)
    after = float((model(short).logits - first).abs().max())
    copied = float((untouched(short).logits - first).abs().max())
print(f"alone {alone:g}, after a longer text {after:.2g}, a copy made before {copied:g}")
assert alone == copied == 0
assert after > 1e-5
assert {n: t.tolist() for n, t in model.state_dict().items()} == {
    n: t.tolist() for n, t in untouched.state_dict().items()
}
PYTHON

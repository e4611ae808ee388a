#!/usr/bin/env bash
# peft 0.21.2 with transformers 5.23.0: all-linear with r=8 on Mixtral gives experts rank 16, adapts
# the router, and says that the rank of 16 was ignored.
#
# The experts' gate and up are one array in transformers 5, so that peft doubles the rank there
# (a rank_pattern of its own), unasked and unsaid; target_parameters also gets gate.weight, the
# router's. The warning "The following rank_pattern keys did not match any targeted module and were
# ignored" is untrue: the array has 4 experts x 16 rows. Naming the array in target_parameters gives
# the rank that was asked for. Bytes counted from r alone are wrong by the difference.
#
# Seen: all-linear: rank 16, the router is adapted, the warning True; by name: rank 8
set -euo pipefail
source "$(dirname "$0")/run_python.sh"
run_python torch==2.13.0 transformers==5.23.0 peft==0.21.2 numpy==2.4.6 <<'PYTHON'
import warnings

from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

EXPERTS, RANK = 4, 8


def adapters(**targets):
    config = AutoConfig.for_model(
        "mixtral", vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=EXPERTS,
    )
    model = AutoModelForCausalLM.from_config(config)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        adapted = get_peft_model(model, LoraConfig(r=RANK, task_type="CAUSAL_LM", **targets))
    rows = {n: p.shape[0] for n, p in adapted.named_parameters() if "lora_A" in n}
    return rows, any("rank_pattern keys did not match" in str(each.message) for each in said)


rows, warned = adapters(target_modules="all-linear")
experts = [count // EXPERTS for name, count in rows.items() if ".experts." in name]
router = [name for name in rows if ".mlp.gate." in name]
named, _ = adapters(target_modules=[], target_parameters=["experts.gate_up_proj"])
[own] = [count // EXPERTS for count in named.values()]
print(f"all-linear: rank {max(experts)}, the router is {'' if router else 'not '}adapted, "
      f"the warning {warned}; by name: rank {own}")
assert sorted(experts) == [RANK, 2 * RANK]
assert len(router) == 1 and warned and own == RANK
PYTHON

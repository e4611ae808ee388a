#!/usr/bin/env bash
# flwr 1.42.0: FedAdam's first step is 0.742 times what Adam's is, and the paper's.
#
# Algorithm 2 of Reddi et al. 2021 (arXiv:2003.00295), which the class names as its source, has no
# bias correction. Adam (Kingma & Ba, arXiv:1412.6980) corrects with t = 1 in its first step. Flower
# corrects with server_round + 1, and rounds start at 1: with betas .9 and .99 the first step is
# multiplied by sqrt(1 - .99^2) / (1 - .9^2) = .742, where t = 1 gives sqrt(1 - .99) / (1 - .9) = 1.
# (flwr/serverapp/strategy/fedadam.py, aggregate_train)
#
# Seen: flower 0.073511, algorithm 2 and Adam at t = 1 0.099010
set -euo pipefail
source "$(dirname "$0")/run_python.sh"
run_python flwr==1.42.0 <<'PYTHON'
import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdam
from flwr.supercore.task_identity import TaskIdentity

ETA, BETA_1, BETA_2, TAU = 0.1, 0.9, 0.99, 1e-3


TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 0, 1  # as a ServerApp has


def reply(node, value):
    content = RecordDict({
        "arrays": ArrayRecord({"w": Array(np.array([value]))}),
        "metrics": MetricRecord({"num-examples": 1}),
    })
    asked = Message(RecordDict(), dst_node_id=node, message_type="train")
    return Message(content, reply_to=asked)


strategy = FedAdam(eta=ETA, beta_1=BETA_1, beta_2=BETA_2, tau=TAU)
strategy.current_arrays = {"w": np.array([0.0])}  # as configure_train leaves it
arrays, _ = strategy.aggregate_train(1, [reply(1, 1.0), reply(2, 1.0)])  # every client moved by 1
flower = float(arrays["w"].numpy()[0])
paper = ETA * (1 - BETA_1) / (np.sqrt(1 - BETA_2) + TAU)
print(f"flower {flower:.6f}, algorithm 2 and Adam at t = 1 {paper:.6f}")
assert abs(flower / paper - np.sqrt(1 - BETA_2**2) / (1 - BETA_1**2)) < 1e-6
assert abs(flower / paper - 0.7425) < 1e-3
PYTHON

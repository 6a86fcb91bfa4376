"""ray.serve.llm on port 8000 with the costless engine.

    python ray_serve_llm.py MODEL_FOLDER [BATCHING_MS]

The environment tells the mode: RAY_SERVE_ENABLE_HA_PROXY and RAY_SERVE_THROUGHPUT_OPTIMIZED.
"""

from __future__ import annotations

import os
import sys

import ray
from ray import serve
from ray.serve.llm import LLMConfig, build_openai_app


def main(folder: str, batching_ms: float | None) -> None:
    one = {"min_replicas": 1, "max_replicas": 1}
    config = LLMConfig(
        model_loading_config={"model_id": "relay", "model_source": folder},
        deployment_config={"autoscaling_config": one, "max_ongoing_requests": 1024},
        placement_group_config={"bundles": [{"CPU": 0.5}]},
        engine_kwargs={"dtype": "float32", "enforce_eager": True, "max_model_len": 2048},
        runtime_env={
            "env_vars": {
                "RAYLLM_VLLM_ENGINE_CLS": "costless_engine.CostlessEngine",
                "PYTHONPATH": os.environ["PYTHONPATH"],
                "HF_HUB_OFFLINE": "1",
            }
        },
        log_engine_metrics=False,
        **({} if batching_ms is None else {"experimental_configs": {"stream_batching_interval_ms": batching_ms}}),
    )
    ray.init(include_dashboard=False)
    ingress = {"ray_actor_options": {"num_cpus": 0.1}, "autoscaling_config": one}
    serve.run(build_openai_app({"llm_configs": [config], "ingress_deployment_config": ingress}), blocking=True)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]) if len(sys.argv) > 2 else None)

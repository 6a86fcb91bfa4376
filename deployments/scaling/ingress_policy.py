"""How many ingress replicas: by the requests that each has open, and by how late its event loop is."""

from __future__ import annotations

from ray.serve.config import AutoscalingContext

from deployments.scaling.decision import Decision, ReplicaScaler, Wanted
from deployments.scaling.engine_policy import PacedPolicy, latest_values
from deployments.scaling.ingress_demand import LAG, model_demands
from deployments.scaling.scaling_board import report_demands

__all__ = ["IngressPolicy", "wanted_ingresses"]

_TARGET_OPEN_REQUESTS = 256
"""Per ingress replica."""
_TARGET_LAG_S = 0.05
"""Timers of an event loop that come later than this, on average over some seconds, tell of a full core."""
_DOWN_AFTER_S = 120.0


def wanted_ingresses(replicas: int, open_requests: float, lag_s: float) -> Wanted:
    """`replicas` run, have `open_requests` together, and are late by `lag_s` on average."""
    by_requests = Wanted(
        open_requests / _TARGET_OPEN_REQUESTS,
        f"{open_requests:.0f} requests are open, {_TARGET_OPEN_REQUESTS} are for one",
    )
    # Twice as late as wanted asks for one more of each that there is; the share of load that a lag tells is not linear.
    by_lag = Wanted(
        replicas * min(lag_s / _TARGET_LAG_S, 2.0) if lag_s > _TARGET_LAG_S else 0.0,
        f"event loops are {1000 * lag_s:.0f} ms late, {1000 * _TARGET_LAG_S:.0f} ms are fine",
    )
    return max(by_requests, by_lag, key=lambda wanted: wanted.replicas)


class IngressPolicy(PacedPolicy):
    """For `autoscaling_config.policy` of the deployment Ingress; also hands on what its replicas say of the models."""

    def __init__(self, minimum: int, maximum: int) -> None:
        super().__init__()
        self._scaler = ReplicaScaler(minimum, maximum, _DOWN_AFTER_S)

    def _decision(self, now: float, ctx: AutoscalingContext) -> Decision | None:
        # A replica that just started has told Serve's own values only.
        reports = [values for values in latest_values(ctx) if LAG in values]
        report_demands(ctx.current_time, model_demands(reports))
        if not reports:
            return None
        lag_s = sum(values[LAG] for values in reports) / len(reports)
        wanted = wanted_ingresses(len(reports), ctx.total_num_requests, lag_s)
        return self._scaler.decide(now, ctx.target_num_replicas, wanted)

"""From cluster.yaml to what a platform team applies: a RayService for KubeRay and all that belongs around it."""

from serve_app.kubernetes.checks import check_for_kubernetes
from serve_app.kubernetes.manifests import RENDERED_FILES, as_stream, render_folder

__all__ = ["RENDERED_FILES", "as_stream", "check_for_kubernetes", "render_folder"]

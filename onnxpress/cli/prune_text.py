"""What `compress prune` tells of its result."""

from typing import Any

from onnxpress.cli.options import layer_lines


def prune_text(result: dict[str, Any]) -> str:
    """Return the result of the stage as lines: blocks, fit, speed, healing, what is left."""
    lines = layer_lines(result["layers"]) if "layers" in result else []
    if "reconstruction" in result:
        fit = result["reconstruction"]
        lines.append(
            f"blocks' error {100 * fit['before']:.1f} % of what they gave, "
            f"{100 * fit['after']:.1f} % after reconstruction"
        )
    if "measured" in result:
        lines.append(_measured_line(result["measured"]))
    if "healing" in result:
        healing = result["healing"]
        lines.append(
            f"healed for {healing['steps']} steps: loss {healing['loss_first']:.4g} → "
            f"{healing['loss_last']:.4g}"
        )
    if "sparsity" in result:
        lines.append(f"{100 * result['sparsity']['zeros']:.1f} % of the blocks' weights are zero")
    lines += _vocabulary_lines(result.get("vocabulary"))
    end = result["path"]
    if "parameters_after" in result:
        end += f": {result['parameters_before']:,} → {result['parameters_after']:,} parameters"
    return "\n".join([*lines, end])


def _measured_line(found: dict[str, Any]) -> str:
    if "megabytes" in found:
        return f"{found['megabytes_before']:.1f} → {found['megabytes']:.1f} MB of weights"
    low, high = found["interval"]
    return (
        f"{found['milliseconds_before']:.1f} → {found['milliseconds']:.1f} ms a call, measured: "
        f"{found['speedup']:.2f} × as fast ({low:.2f} to {high:.2f})"
    )


def _vocabulary_lines(found: dict[str, Any] | None) -> list[str]:
    if found is None:
        return []
    lines = [f"{found['tokens_before']:,} → {found['tokens_after']:,} tokens"]
    if "unknown_words" in found:
        lines.append(
            f"{100 * found['unknown_words']:.2f} % of words that were not seen are unknown, "
            f"{100 * found['unknown_words_before']:.2f} % before"
        )
    return lines

"""What gradient_fidelity.py measured: averages, tables, and the figure."""
from pathlib import Path

from benchmarks.half_precision import ALWAYS_FULL
from utils.devices import PRECISIONS

LABELS = ("precision", "chain", "T", "v", "step", "in fp32", "in half")
IN_FULL_PRECISION = ("conv_in", "conv_out", "injectors' maps", *ALWAYS_FULL)
Row = tuple[dict, dict]  # what was measured: label, numbers


def averages(draws: list[list[Row]]) -> list[dict]:
    """One row for each of what every draw measured: means, the worst group, and the least cosine of a draw."""
    rows = []
    for same in zip(*draws, strict=True):
        measured = mean([values for _, values in same])
        groups = measured.pop("groups")
        group = max(groups, key=groups.get)
        rows.append(same[0][0] | measured | {
            "cosine": round(1 - measured["off"], 7), "least_cosine": round(1 - max(v["off"] for _, v in same), 7),
            "worst_group": group, "worst_group_cosine": round(1 - groups[group], 7)})
    return rows


def mean(values: list) -> dict | float:
    """Of numbers, or of dictionaries of them."""
    if isinstance(values[0], dict):
        return {key: mean([value[key] for value in values]) for key in values[0]}
    return float(f"{sum(values) / len(values):.4g}")


def show(part: str, rows: list[dict]) -> None:
    """The table of a part."""
    fixed = "fixed_signs" in rows[0]
    print(f"\n{part:42}{'cosine':>10}{'least':>10}{'error':>9}"
          + (f"{'signs:':>8}{'cosine':>9}{'error':>9}{'flipped':>9}" if fixed else "") + "  worst group")
    for row in rows:
        label = ", ".join(value if isinstance(value, str) else f"{key} {value}" for key, value in row.items()
                          if key in LABELS)
        print(f"{label:42}{row['cosine']:10.6f}{row['least_cosine']:10.6f}{row['relative_error']:9.1e}"
              + (f"{1 - row['fixed_signs']['off']:17.6f}{row['fixed_signs']['relative_error']:9.1e}"
                 f"{row['flipped_pixels']:9.1e}" if fixed else "")
              + f"  {row['worst_group']} {row['worst_group_cosine']:.5f}", flush=True)


def draw(results: dict, path: Path) -> None:
    """1 - cosine against T, the error against v, and what each ingredient costs where that was measured."""
    from benchmarks.pictures import plt, save

    ablation = [row for row in results.get("ablate_compact", {}).get("rows", ())
                if "in half" in row and row["precision"] == "bf16"]
    figure, ((left, middle, *right),) = plt.subplots(1, 2 + bool(ablation), figsize=(15 if ablation else 10, 4.6),
                                                     squeeze=False, layout="constrained")
    _draw_small_v(middle, results.get("small_v_narrow", {}).get("rows", []))
    rows = results.get("reversal_narrow", {}).get("rows", [])
    for precision, colour in zip(PRECISIONS, ("tab:blue", "tab:red", "tab:green"), strict=True):
        for step, style in (("stored", "-o"), ("inverted", "--v"), ("changed", ":x")):
            line = [row for row in rows if row["precision"] == precision and row["step"].endswith(step)]
            left.semilogy([row["T"] for row in line], [max(row["off"], 1e-13) for row in line], style, color=colour,
                          markersize=4, label=f"{precision}, {line[0]['step']}" if line else None)
    left.axhline(1e-4, color="grey", linewidth=1, label="cosine 0.9999")
    left.set(xlabel="T", title="against plain autograd in the same precision")
    left.set_ylabel("1 - cosine to plain autograd (0 at 1e-13)")
    ablation.sort(key=lambda row: row["fixed_signs"]["relative_error"])
    for axes in right:
        axes.barh([row["in half"] for row in ablation], [row["fixed_signs"]["relative_error"] for row in ablation],
                  color=["tab:blue" if row["in half"] in IN_FULL_PRECISION else "lightgrey" for row in ablation])
        axes.set(xscale="log", xlabel="relative error of the gradient", title="this alone in bf16 (blue: here in fp32)")
    if left.lines:
        figure.legend(*left.get_legend_handles_labels(), loc="outside lower left", ncols=4 if right else 2, fontsize=8)
    save(figure, path, dpi=120)


def _draw_small_v(axes, rows: list[dict]) -> None:
    """Relative error of the gradient in fp32 against v of level two; 0 is drawn at the precision's own rounding."""
    for steps, style in ((3, "-"), (6, "--")):
        for step, colour in (("stored", "tab:blue"), ("inverted", "tab:red")):
            line = [row for row in rows if (row["precision"], row["T"], row["step"]) == ("fp32", steps, step)]
            axes.plot([row["v"] for row in line], [max(row["relative_error"], 1e-8) for row in line], style + "o",
                      color=colour, markersize=4, label=f"streams {step}, T = {steps}")
    axes.set(yscale="log", xlabel="v of every coupling of level two", title="the same in fp32, perturbed weights",
             ylabel="relative error of the gradient (0 at 1e-8)")
    axes.set_xscale("symlog", linthresh=0.01)
    axes.set_xlim(-0.002, 1.3)
    axes.legend(fontsize=8)

// A cell for every step, with the level that ran, and what the colours mean.

/** The strip of steps. `levels` are the bundle's patches. */
export class Strip {
  constructor(strip, legend, levels) {
    this.strip = strip;
    this.legend = legend;
    this.levels = [...levels].sort((one, other) => one - other);
  }

  /** Show `steps` cells that nothing is known of yet. */
  start(steps) {
    this.done = [];
    this.strip.replaceChildren(...Array.from({ length: steps }, () => document.createElement("span")));
    this.strip.setAttribute("aria-label", `${steps} steps, none done`);
    this.showLegend(false);
  }

  /** Fill the cell of a step with what a `ddit.progress` event says of it. */
  add({ step, level, scale, sigma, milliseconds, by }) {
    const cell = this.strip.children[step - 1];
    cell.className = this.look(level);
    cell.textContent = level ?? "";
    cell.classList.toggle("small", scale < 1);
    const what = level === null ? `predicted by ${by}` : `level ${level}`;
    const size = scale < 1 ? ` at ${scale} of the size` : "";
    cell.title = `step ${step}: ${what}${size}, σ ${sigma.toFixed(3)}, ${milliseconds.toFixed(1)} ms`;
    this.done.push({ level, scale });
    this.strip.setAttribute("aria-label", this.summary());
    this.showLegend(this.done.some((one) => one.scale < 1));
  }

  /** "50 steps: 18 at level 2, 32 predicted", of those that are done. */
  summary() {
    const count = (wanted) => this.done.filter(({ level }) => level === wanted).length;
    const parts = this.levels.filter(count).map((level) => `${count(level)} at level ${level}`);
    if (count(null)) parts.push(`${count(null)} predicted`);
    return `${this.done.length} of ${this.strip.children.length} steps: ${parts.join(", ")}`;
  }

  showLegend(small) {
    const entries = this.levels.map((level) => [this.look(level), level, `level ${level}`]);
    entries.push([this.look(null), "", "predicted"], ["", "", "to come"]);
    if (small) entries.push(["small", "", "at a smaller size"]);
    this.legend.replaceChildren(
      ...entries.map(([look, text, meaning]) => {
        const entry = document.createElement("li");
        const cell = document.createElement("span");
        cell.className = look;
        cell.textContent = text;
        entry.append(cell, ` ${meaning}`);
        return entry;
      }),
    );
  }

  look(level) {
    return level === null ? "predicted" : `level level-${Math.min(this.levels.indexOf(level), 3)}`;
  }
}

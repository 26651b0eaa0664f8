// What is painted: cards of jobs, the slider between source and painted, the viewer, the history.

/** An element with properties and children. */
export function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

/** A button of the kind that stands under a picture. */
export function action(text, does, title = "") {
  const button = element("button", { type: "button", title }, text);
  button.addEventListener("click", does);
  return button;
}

/** A painted picture that is opened by a click; with the source a slider between the two. */
export function stack(painted, source, name, open) {
  const top = element("img", { src: painted, alt: name });
  const frame = element(open ? "button" : "div", { className: "stack" }, top);
  if (open) {
    Object.assign(frame, { type: "button", ariaLabel: `Enlarge: ${name}` });
    frame.addEventListener("click", open);
  }
  if (!source) return element("div", {}, frame);
  const under = element("img", { src: source, alt: "the source", className: "source" });
  const rule = element("i", { className: "rule" });
  frame.append(under, rule);
  const input = element("input", { type: "range", min: 0, max: 100, value: 0, ariaLabel: "Source against painted" });
  const show = () => {
    under.style.clipPath = `inset(0 ${100 - input.value}% 0 0)`;
    rule.style.left = `${input.value}%`;
    rule.hidden = input.value === "0";
    input.ariaValueText = `${input.value} % of the source`;
  };
  input.addEventListener("input", show);
  show();
  const ends = element("span", { className: "ends" }, element("span", {}, "source"), element("span", {}, "painted"));
  return element("div", {}, frame, input, ends);
}

const words = {
  queued: "queued", loading: "reading the model", compiling: "compiling", painting: "painting",
  done: "done", failed: "failed", cancelled: "cancelled",
};

/** What a job is doing, in words. */
export function told(view) {
  if (view.state === "queued" && view.ahead) return `queued, ${view.ahead} ahead`;
  if (view.state !== "painting") return words[view.state];
  if (!view.step) return words.painting;
  const which = view.num > 1 ? `picture ${Math.min(view.pictures.length + 1, view.num)} of ${view.num}, ` : "";
  return `painting: ${which}step ${view.step} of ${view.steps}`;
}

/** A card for one prompt: a column for each of its tasks, one or two that are compared. */
export class Card {
  constructor(prompt, columns, cancel) {
    this.cancel = action("Cancel", cancel, "Esc");
    this.time = element("span", { className: "grey" });
    this.columns = columns.map((name) => {
      const progress = element("progress", { max: 1, value: 0, ariaLabel: "Progress" });
      const state = element("span", { className: "state" }, "waiting");
      const figures = element("div", { className: "figures" });
      const notes = element("div");
      const heading = columns.length > 1 ? [element("h3", {}, name)] : [];
      const line = element("p", { className: "line" }, progress, state);
      const node = element("div", { className: "column" }, ...heading, line, notes, figures);
      return { node, progress, state, figures, notes, line };
    });
    const head = element("div", { className: "head" }, element("h2", {}, prompt), this.time, this.cancel);
    const body = element("div", { className: "columns" }, ...this.columns.map(({ node }) => node));
    this.node = element("article", {}, head, body);
  }

  /** Shows how far the task of a column is. */
  state(column, view) {
    const { progress, state, notes, line } = this.columns[column];
    const whole = view.num * view.steps;
    progress.value = whole ? (view.pictures.length * view.steps + view.step) / whole : 0;
    state.textContent = told(view);
    const lines = [...(view.notes ?? []), ...(view.error ? [view.error] : [])];
    notes.replaceChildren(...lines.map((text) => element("p", { className: "note" }, text)));
    line.hidden = view.state === "done";
    if (view.state === "done") this.time.textContent = `${view.seconds.toFixed(1)} s`;
    if (["failed", "cancelled"].includes(view.state)) {
      progress.hidden = true;
      this.columns[column].preview?.remove();
    }
  }

  /** Shows what a picture is becoming. */
  preview(column, picture, [width, height]) {
    const own = this.columns[column];
    if (!own.preview?.isConnected) {
      own.image = element("img", { alt: "preview" });
      own.preview = element("figure", { className: "preview" }, element("div", { className: "stack" }, own.image));
      own.figures.append(own.preview);
      fit(own.preview, width, height);
    }
    own.image.src = picture;
  }

  /** Adds a painted picture in the place of its preview. */
  add(column, figure) {
    this.columns[column].preview?.remove();
    this.columns[column].figures.append(figure);
  }

  /** Nothing is to be done any more. */
  end() {
    this.cancel.remove();
  }
}

/** Gives a figure the width at which its picture has whole pixels, and is neither tiny nor huge. */
export function fit(figure, width, height) {
  const scale = Math.max(1, Math.floor(320 / Math.max(width, height)));
  figure.style.width = `${Math.min(width * scale, 512)}px`;
}

/** The dialog in which one picture is looked at. */
export class Viewer {
  #scale = 1;
  #size = [1, 1];

  constructor() {
    this.dialog = document.querySelector("#viewer");
    this.canvas = this.dialog.querySelector("#canvas");
    this.dialog.querySelector("#smaller").addEventListener("click", () => this.#zoom(-1));
    this.dialog.querySelector("#larger").addEventListener("click", () => this.#zoom(1));
    this.dialog.querySelector("#close").addEventListener("click", () => this.dialog.close());
    this.dialog.addEventListener("click", (event) => event.target === this.dialog && this.dialog.close());
    this.dialog.addEventListener("keydown", (event) => {
      if (event.key === "+" || event.key === "=") this.#zoom(1);
      if (event.key === "-") this.#zoom(-1);
    });
  }

  /** Shows a picture of a size with its slider, tools and facts [[name, text]]. */
  open(painted, source, [width, height], name, tools, facts) {
    this.#size = [width, height];
    this.canvas.replaceChildren(stack(painted, source, name));
    this.dialog.querySelector(".tools").replaceChildren(...tools);
    const lines = facts.map(([term, text]) => element("div", {}, element("dt", {}, term), element("dd", {}, text)));
    this.dialog.querySelector("#facts").replaceChildren(...lines);
    const room = Math.min(window.innerWidth - 64, window.innerHeight - 340) / Math.max(width, height);
    this.#scale = Math.min(8, Math.max(1, Math.floor(room)));
    this.#zoom(0);
    this.dialog.showModal();
  }

  #zoom(by) {
    this.#scale = Math.min(16, Math.max(1, this.#scale + by));
    this.dialog.querySelector("#scale").value = `${this.#scale}×`;
    this.canvas.firstChild.style.width = `${this.#size[0] * this.#scale}px`;
  }
}

// The fields of the form: read, filled, and remembered.

import { element } from "./results.js";

const at = (id) => document.getElementById(id);
const NUMBERS = ["steps", "guidance", "image_guidance", "zero_init_steps"];

/** The fields, filled by what /api/models says of the app. */
export class Form {
  constructor(app) {
    this.app = app;
    for (const solver of app.solvers) at("solver").append(element("option", { value: solver }, solver));
    for (const id of ["model", "model2"]) {
      for (const { name } of app.models) at(id).append(element("option", { value: name }, name));
      at(id).addEventListener("change", () => this.#follow());
    }
    at("model2").selectedIndex = at("ema2").checked = app.models.length > 1 ? 1 : 0;
    at("num").max = app.max_pictures;
    at("compare").addEventListener("change", () => this.#follow());
    at("dice").addEventListener("click", () => this.roll());
    for (const range of document.querySelectorAll("input[data-for]")) {
      const number = at(range.dataset.for);
      range.addEventListener("input", () => (number.value = range.value));
      number.addEventListener("input", () => (range.value = number.value));
    }
    this.settings = app.settings;
    this.#follow();
  }

  roll() {
    at("seed").value = crypto.getRandomValues(new Uint32Array(1))[0];
  }

  /** Sizes and averages are those of the chosen models. */
  #follow() {
    const model = this.#model("model");
    this.#drawSizes(model.sizes, this.size);
    at("second").hidden = !at("compare").checked;
    for (const [id, box] of [["model", "ema"], ["model2", "ema2"]]) {
      const { ema } = this.#model(id);
      at(box).disabled = !ema;
      at(box).parentElement.classList.toggle("off", !ema);
    }
    if (this.app.models.length === 1) at("ema2").checked = !at("ema").checked;
    at("compare").disabled = this.app.models.length === 1 && !model.ema;
  }

  #model(id) {
    return this.app.models.find(({ name }) => name === at(id).value) ?? this.app.models[0];
  }

  #drawSizes(sizes, chosen) {
    const all = chosen && !sizes.includes(chosen) ? [...sizes, chosen] : sizes;
    const chips = ["", ...all].map((size) => {
      const input = element("input", { type: "radio", name: "size", value: size, checked: size === (chosen ?? "") });
      const [width, height] = size ? size.split("x").map(Number) : [0, 0];
      const shape = element("i", { ariaHidden: "true" });
      const scale = 16 / Math.max(width, height, 1);
      if (size) Object.assign(shape.style, { width: `${width * scale}px`, height: `${height * scale}px` });
      const title = size ? "" : "the trained size that is nearest to the source, or the first";
      return element("label", { title }, input, ...(size ? [shape] : []), size ? `${width} × ${height}` : "automatic");
    });
    const legend = at("sizes").querySelector("legend");
    at("sizes").replaceChildren(legend, ...chips);
  }

  get size() {
    return document.querySelector("input[name=size]:checked")?.value || null;
  }

  get settings() {
    const found = { solver: at("solver").value, symmetric_guidance: at("symmetric_guidance").checked };
    for (const id of NUMBERS) found[id] = number(id);
    found.guidance_end = at("guidance_end").value === "" ? null : number("guidance_end");
    found.guidance_interval = [number("interval_first"), number("interval_last")];
    found.renormalize = { true: true, false: false }[at("renormalize").value] ?? null;
    return found;
  }

  set settings(given) {
    for (const id of [...NUMBERS, "guidance_end", "renormalize"]) {
      at(id).value = given[id] ?? "";
      const range = document.querySelector(`input[data-for=${id}]`);
      if (range) range.value = at(id).value;
    }
    at("solver").value = given.solver;
    at("symmetric_guidance").checked = Boolean(given.symmetric_guidance);
    [at("interval_first").value, at("interval_last").value] = given.guidance_interval ?? [0, 1];
  }

  /** What is asked for, without pictures: one form, or one for each of two models, which then have
      the same noise; throws an Error in words. */
  read() {
    const same = {
      prompt: at("prompt").value, size: this.size, seed: number("seed"), num: number("num"),
      preview: number("preview"), settings: this.settings,
    };
    if (at("compare").checked && !this.size) {
      const [one, other] = ["model", "model2"].map((id) => this.#model(id).sizes.join());
      if (one !== other) throw new Error("choose a size: the two models were trained with different ones");
    }
    const both = at("compare").checked ? [["model", "ema"], ["model2", "ema2"]] : [["model", "ema"]];
    return both.map(([model, ema]) => ({ ...same, model: at(model).value, ema: at(ema).checked && !at(ema).disabled }));
  }

  /** Fills in how a picture was painted; returns what could not be. */
  fill({ prompt, seed, settings }) {
    at("prompt").value = prompt;
    at("seed").value = seed;
    at("num").value = Math.min((settings.number ?? 0) + 1, this.app.max_pictures);
    this.settings = { ...this.app.settings, ...settings };
    const known = this.app.models.find(({ name }) => name === settings.checkpoint);
    if (known) at("model").value = known.name;
    if ("ema" in settings) at("ema").checked = settings.ema;
    at("compare").checked = false;
    this.#follow();
    this.#drawSizes(this.#model("model").sizes, settings.size ?? null);
    return settings.checkpoint && !known ? [`${settings.checkpoint} is not loaded here`] : [];
  }
}

/** The value of a number field; one that is no number is null, which the server refuses by name. */
function number(id) {
  const value = at(id).value === "" ? NaN : Number(at(id).value);
  return Number.isFinite(value) ? value : null;
}

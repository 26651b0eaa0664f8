// The condition pictures: one source and an ordered tray of references.

import { element } from "./results.js";

const KIND = "application/x-qk-picture";

/** Pictures with their roles, shown in the zones #source and #references. */
export class Roles {
  source = null;
  references = [];
  #dragged = null;

  /** `said` is told what happened, in words; `stray` gets files that are dropped beside the zones. */
  constructor(said, stray) {
    this.said = said;
    this.zones = { source: document.querySelector("#source"), references: document.querySelector("#references") };
    for (const [role, zone] of Object.entries(this.zones)) this.#listen(role, zone);
    document.addEventListener("dragover", (event) => event.preventDefault());
    document.addEventListener("drop", (event) => {
      event.preventDefault();
      if (event.dataTransfer.files.length) stray([...event.dataTransfer.files]);
    });
    document.addEventListener("paste", (event) => {
      const files = [...(event.clipboardData?.files ?? [])].filter(isPicture);
      if (!files.length) return;
      event.preventDefault();
      const inside = this.zones.references.contains(document.activeElement);
      this.add(inside || this.source ? "references" : "source", files);
    });
    this.draw();
  }

  /** Adds files to a role. A source is replaced; of several files the first becomes it. */
  add(role, files) {
    const good = files.filter(isPicture);
    if (good.length < files.length) this.said(`${files.find((file) => !isPicture(file)).name} is no picture`);
    if (!good.length) return;
    const pictures = good.map((file) => picture(file, file.name || "pasted.png"));
    if (role === "source") this.source = pictures.shift();
    this.references.push(...pictures);
    this.said(`${good.length === 1 ? good[0].name || "the picture" : `${good.length} pictures`} added as ${role}`);
    this.draw();
  }

  /** Replaces all pictures by {name, blob} of each role. */
  set(source, references) {
    this.source = source ? picture(source.blob, source.name) : null;
    this.references = references.map((one) => picture(one.blob, one.name));
    this.draw();
  }

  #listen(role, zone) {
    const input = zone.querySelector("input");
    zone.querySelector(".add").addEventListener("click", () => input.click());
    input.addEventListener("change", () => {
      this.add(role, [...input.files]);
      input.value = "";
    });
    zone.addEventListener("dragover", (event) => {
      event.preventDefault();
      zone.classList.add("over");
    });
    zone.addEventListener("dragleave", (event) => {
      if (!zone.contains(event.relatedTarget)) zone.classList.remove("over");
    });
    zone.addEventListener("drop", (event) => {
      event.preventDefault();
      event.stopPropagation();
      zone.classList.remove("over");
      const files = [...event.dataTransfer.files];
      if (this.#dragged && event.dataTransfer.types.includes(KIND)) {
        this.move(this.#dragged, role, this.#position(zone, event.clientX, event.clientY));
      } else if (files.length) this.add(role, files);
    });
  }

  /** Before which tile of a zone a drop at (x, y) belongs. */
  #position(zone, x, y) {
    const tiles = [...zone.querySelectorAll(".tile")].map((tile) => tile.getBoundingClientRect());
    const after = tiles.findIndex((box) => y < box.bottom && x < box.left + box.width / 2);
    return after < 0 ? tiles.length : after;
  }

  /** Moves a picture to a role; where it becomes the source, the old one takes its place. */
  move(one, role, position = this.references.length) {
    const from = this.references.indexOf(one);
    if (role === "source") {
      if (from < 0) return;
      if (this.source) this.references[from] = this.source;
      else this.references.splice(from, 1);
      this.source = one;
    } else {
      if (from >= 0) {
        this.references.splice(from, 1);
        if (from < position) position -= 1;
      } else this.source = null;
      this.references.splice(position, 0, one);
    }
    this.said(`${one.name} is ${this.#told(one)}`);
    this.draw();
    this.zones[role].querySelectorAll(".tile")[role === "source" ? 0 : this.references.indexOf(one)]?.focus();
  }

  remove(one) {
    if (one === this.source) this.source = null;
    this.references = this.references.filter((other) => other !== one);
    this.said(`${one.name} removed`);
    this.draw();
  }

  #told(one) {
    return one === this.source ? "the source" : `reference ${this.references.indexOf(one) + 1}`;
  }

  draw() {
    const { source, references } = this.zones;
    source.querySelector(".tiles").replaceChildren(...(this.source ? [this.#tile(this.source, "source")] : []));
    references.querySelector(".tiles").replaceChildren(...this.references.map((one) => this.#tile(one, "references")));
    source.querySelector(".add").hidden = Boolean(this.source);
  }

  #tile(one, role) {
    const other = role === "source" ? "references" : "source";
    const index = this.references.indexOf(one);
    const act = (label, text, action) => {
      const button = element("button", { type: "button", title: label, ariaLabel: `${label}: ${one.name}` }, text);
      button.addEventListener("click", action);
      return button;
    };
    const tools = element("span", { className: "tools" });
    if (role === "references" && this.references.length > 1) {
      tools.append(act("Earlier", "←", () => this.move(one, role, Math.max(0, index - 1))));
      tools.append(act("Later", "→", () => this.move(one, role, index + 2)));
    }
    tools.append(
      act(role === "source" ? "Make it a reference" : "Make it the source", "⇄", () => this.move(one, other)),
      act("Remove", "×", () => this.remove(one)),
    );
    const image = element("img", { src: one.url, alt: `${this.#told(one)}: ${one.name}`, draggable: false });
    const tile = element("li", { className: "tile", draggable: true, tabIndex: 0 }, image, tools);
    tile.setAttribute("aria-label", `${this.#told(one)}: ${one.name}; arrow keys move it, Delete removes it`);
    tile.addEventListener("dragstart", (event) => {
      this.#dragged = one;
      event.dataTransfer.setData(KIND, one.name);
      event.dataTransfer.effectAllowed = "move";
    });
    tile.addEventListener("dragend", () => (this.#dragged = null));
    tile.addEventListener("keydown", (event) => {
      if (event.target !== tile) return;
      if (event.key === "Delete" || event.key === "Backspace") this.remove(one);
      else if (role === "references" && event.key === "ArrowLeft" && index > 0) this.move(one, role, index - 1);
      else if (role === "references" && event.key === "ArrowRight") this.move(one, role, index + 2);
      else if (event.key === "ArrowUp" && role === "references") this.move(one, "source");
      else if (event.key === "ArrowDown" && role === "source") this.move(one, "references", 0);
      else return;
      event.preventDefault();
    });
    return tile;
  }
}

const isPicture = (file) => file.type.startsWith("image/");

/** A condition picture as it is shown. */
export const picture = (blob, name) => ({ blob, name, url: URL.createObjectURL(blob) });

// The page: what is asked for goes to /api/paint, and what comes back is shown.

import { base64, recipeOf, Store } from "./files.js";
import { Form } from "./form.js";
import { picture, Roles } from "./pictures.js";
import { action, Card, element, fit, stack, told, Viewer } from "./results.js";

const at = (id) => document.getElementById(id);
const AT_ONCE = 2; // jobs of this page that the server has; the others wait here
const AGAIN = 1500; // milliseconds until a full queue is asked again
const ENDED = ["done", "failed", "cancelled"];
const store = new Store();
const viewer = new Viewer();
let app, form, roles;
let tasks = []; // waiting and at work, in order

const say = (text) => (at("status").textContent = text);

function complain(text) {
  at("error").textContent = text;
  at("error").hidden = !text;
}

/** The answer of the app as JSON; throws an Error with its one line. */
async function ask(path, method = "GET", body) {
  let answer;
  try {
    answer = await fetch(path, {
      method,
      ...(body && { body: JSON.stringify(body), headers: { "Content-Type": "application/json" } }),
    });
  } catch {
    throw new Error("the app does not answer; is it still running?");
  }
  const told = await answer.json().catch(() => ({}));
  if (!answer.ok) throw Object.assign(new Error(told.error ?? `status ${answer.status}`), { status: answer.status });
  return told;
}

/** Lets forms wait to be painted. */
function queue(forms, pictures) {
  addTasks(forms, pictures);
  pump();
}

/** Tasks for forms, with a card for those that are compared. */
function addTasks(forms, pictures) {
  at("empty").hidden = true;
  const names = forms.map(({ model, ema }) => (ema ? model : `${model}, last weights`));
  const made = forms.map((asked, column) => ({ asked, pictures, column, state: "waiting" }));
  const card = new Card(forms[0].prompt, names, () => made.forEach(cancel));
  for (const task of made) task.card = card;
  card.tasks = made;
  at("results").prepend(card.node);
  if (matchMedia("(max-width: 56rem)").matches) card.node.scrollIntoView({ block: "start" });
  tasks.push(...made);
  drawQueue();
  return made;
}

/** Sends waiting tasks while the server has less of them than it should. */
async function pump() {
  for (const task of tasks) {
    if (tasks.filter(({ state }) => state !== "waiting").length >= AT_ONCE) break;
    if (task.state === "waiting") await send(task);
  }
}

async function send(task) {
  task.state = "sending";
  try {
    const upload = async ({ name, blob }) => ({ name, data: await base64(blob) });
    const { source, references } = task.pictures;
    const body = {
      ...task.asked,
      source: source && (await upload(source)),
      references: await Promise.all(references.map(upload)),
    };
    const size = JSON.stringify(body).length;
    if (size > app.max_bytes) throw new Error(`the pictures have more than ${app.max_bytes >> 20} MiB together`);
    const view = await ask("/api/paint", "POST", body);
    if (task.state === "cancelled") return ask(`/api/jobs/${view.id}`, "DELETE");
    if (source || references.length) {
      store.hold(view.id, { source: kept(source), references: references.map(kept) });
    }
    follow(task, view);
  } catch (error) {
    if (task.state === "cancelled") return;
    if (error.status === 429) {
      task.state = "waiting";
      say(error.message);
      setTimeout(pump, AGAIN);
      return;
    }
    complain(error.message);
    const view = { state: "failed", error: error.message, pictures: [], num: 1, steps: 1, step: 0 };
    task.card.state(task.column, view);
    end(task);
  }
}

/** Listens to a job until it is over. */
function follow(task, view) {
  task.id = view.id;
  task.taken ??= 0;
  task.stored ??= 0;
  const takes = [];
  remember();
  task.card.state(task.column, view);
  const events = new EventSource(`/api/jobs/${view.id}`);
  task.close = () => events.close();
  const size = view.size.split("x").map(Number);
  events.addEventListener("preview", (event) => {
    task.card.preview(task.column, JSON.parse(event.data).picture, size);
  });
  events.addEventListener("state", (event) => {
    const now = JSON.parse(event.data);
    if (task.state !== now.state) say(told({ ...now, step: 0 }));
    task.state = now.state;
    task.card.state(task.column, now);
    while (task.taken < now.pictures.length) {
      takes.push(take(task, now.pictures[task.taken], size, task.taken++ >= task.stored));
    }
    if (ENDED.includes(now.state)) {
      events.close();
      Promise.allSettled(takes).then(() => end(task)); // remembered until its pictures are in the history
    }
    drawQueue();
  });
  events.addEventListener("error", async () => {
    say("the app does not answer; trying again");
    if (events.readyState !== EventSource.CLOSED) return; // the browser tries again
    try {
      follow(task, await ask(`/api/jobs/${view.id}`)); // no answer where this page is being left
    } catch (error) {
      if (error.status !== 404) return;
      task.card.state(task.column, { ...view, state: "failed", error: error.message });
      end(task);
    }
  });
}

/** Shows a painted picture and, where it is new, keeps it in the history. */
async function take(task, path, size, isNew) {
  const figure = element("figure");
  fit(figure, ...size);
  task.card.add(task.column, figure);
  const answer = await fetch(path).catch(() => null);
  if (!answer?.ok) {
    figure.remove();
    return complain("a painted picture could not be fetched; paint it again");
  }
  const blob = await answer.blob();
  const item = {
    key: Date.now() + Math.random(), blob, size, recipe: await recipeOf(blob),
    source: kept(task.pictures.source), references: task.pictures.references.map(kept),
  };
  figure.append(
    stack(URL.createObjectURL(blob), task.pictures.source?.url, task.asked.prompt, () => show(item)),
    element("figcaption", {}, ...tools(item)),
  );
  if (!isNew) return;
  await store.add(item);
  task.stored += 1;
  remember();
  drawHistory();
}

const kept = (picture) => picture && { name: picture.name, blob: picture.blob };

function end(task) {
  task.close?.();
  if (task.id) store.release(task.id);
  tasks = tasks.filter((other) => other !== task);
  remember();
  if (!task.card.tasks.some((other) => tasks.includes(other))) task.card.end();
  drawQueue();
  pump();
}

/** Keeps which jobs are at work, and how many of their pictures the history has, for when this page is loaded anew. */
function remember() {
  const known = tasks.filter(({ id }) => id).map(({ id, stored }) => ({ id, stored }));
  sessionStorage.setItem("jobs", JSON.stringify(known));
}

/** Follows the jobs that this page had before it was loaded anew, with what they were given. */
async function resume() {
  const mine = JSON.parse(sessionStorage.getItem("jobs") ?? "[]");
  for (const { id, stored } of mine) {
    const view = await ask(`/api/jobs/${id}`).catch(() => null);
    if (!view) continue;
    const { source, references } = (await store.held(id)) ?? { references: [] };
    const pictures = { source: source && shown(source), references: references.map(shown) };
    const [task] = addTasks([{ prompt: view.prompt, model: view.model, ema: view.ema }], pictures);
    task.stored = stored;
    follow(task, view);
  }
  const all = await ask("/api/jobs").catch(() => null);
  const others = all?.filter(({ state }) => !ENDED.includes(state)); // of other pages
  if (others) await store.releaseOthers([...mine, ...others].map(({ id }) => id));
}

const shown = ({ name, blob }) => picture(blob, name);

function cancel(task) {
  if (!tasks.includes(task)) return;
  task.state = "cancelled";
  if (task.id) ask(`/api/jobs/${task.id}`, "DELETE").catch(() => {});
  task.card.state(task.column, { state: "cancelled", pictures: [], num: 1, steps: 1, step: 0 });
  say("cancelled");
  end(task);
}

function drawQueue() {
  at("queue").hidden = tasks.length < 2;
  at("queue").querySelector("ol").replaceChildren(
    ...tasks.map((task) =>
      element("li", {}, element("span", { className: "words" }, task.asked.prompt),
        element("span", { className: "grey" }, task.state), action("Cancel", () => cancel(task)))),
  );
}

// ---- what is done with a picture ----------------------------------------------------------------

/** The name under which a picture is kept on disk. */
function nameOf(item) {
  const words = (item.recipe?.prompt ?? "painted").toLowerCase().replace(/[^a-z0-9]+/g, "-").slice(0, 40);
  return `${words.replace(/^-|-$/g, "") || "painted"}-${item.recipe?.seed ?? 0}.png`;
}

function tools(item) {
  const link = element("a", { className: "button", href: URL.createObjectURL(item.blob), download: nameOf(item) }, "Download");
  const use = (role) => () => {
    viewer.dialog.close();
    roles.add(role, [new File([item.blob], nameOf(item), { type: "image/png" })]);
  };
  const settings = action("Settings", () => reload(item), "Take over its prompt, pictures and settings");
  return [link, action("As source", use("source"), "Use it as the source"),
    action("As reference", use("references"), "Use it as a reference"), settings];
}

function show(item) {
  const { prompt, seed, settings } = item.recipe ?? {};
  const facts = settings ? [["prompt", prompt], ["seed", String(seed)], ...Object.entries(settings)] : [];
  const lines = facts
    .filter(([, value]) => value !== null && String(value) !== "")
    .map(([name, value]) => [name.replaceAll("_", " "), Array.isArray(value) ? value.join(", ") : String(value)]);
  const drop = action("Remove", async () => {
    viewer.dialog.close();
    await store.remove(item);
    drawHistory();
  }, "Remove it from the history");
  const source = item.source && URL.createObjectURL(item.source.blob);
  viewer.open(URL.createObjectURL(item.blob), source, item.size, prompt ?? "", [...tools(item), drop], lines);
}

/** Takes over the prompt, the settings and, where they are known, the pictures. */
function reload(item) {
  viewer.dialog.close();
  const missing = form.fill(item.recipe);
  roles.set(item.source, item.references);
  say(["its settings are taken over", ...missing].join("; "));
  at("prompt").focus();
}

/** Files that are opened, or dropped beside the zones: a file of prompts is painted, a painted PNG
    brings its settings, others are pictures. */
async function stray(files) {
  const lines = files.find(({ name }) => /\.(jsonl|json|txt)$/i.test(name));
  if (lines) return paintLines(lines);
  const recipe = files.length === 1 && (await recipeOf(files[0]));
  if (!recipe) return roles.add(roles.source ? "references" : "source", files);
  const { source, references } = recipe.settings;
  const wanted = [source, ...(references ?? [])].filter(Boolean);
  const missing = form.fill(recipe);
  if (wanted.length) missing.push(`give it its pictures again: ${wanted.join(", ")}`);
  say([`the settings of ${files[0].name} are taken over`, ...missing].join("; "));
}

function drawHistory() {
  at("past").hidden = !store.all().length;
  at("history").replaceChildren(
    ...store.all().map((item) => {
      item.url ??= URL.createObjectURL(item.blob);
      const prompt = item.recipe?.prompt ?? "painted";
      const button = element("button", { type: "button", title: prompt, ariaLabel: prompt },
        element("img", { src: item.url, alt: "", loading: "lazy" }));
      button.addEventListener("click", () => show(item));
      return element("li", {}, button);
    }),
  );
}

/** Paints each line of a file of prompts with the settings of the form. */
async function paintLines(file) {
  complain("");
  try {
    const [asked] = form.read();
    const lines = await ask("/api/lines", "POST", { name: file.name, text: await file.text(), seed: asked.seed ?? 0 });
    for (const { prompt, seed } of lines) queue([{ ...asked, prompt, seed }], { source: null, references: [] });
    say(`${lines.length} prompts of ${file.name}`);
  } catch (error) {
    complain(error.message);
  }
}

function paint() {
  complain("");
  try {
    queue(form.read(), { source: roles.source, references: [...roles.references] });
  } catch (error) {
    complain(error.message);
  }
}

async function start() {
  try {
    app = await ask("/api/models");
  } catch (error) {
    say("not ready");
    complain(error.message);
    return;
  }
  form = new Form(app);
  roles = new Roles(say, stray);
  at("form").addEventListener("submit", (event) => {
    event.preventDefault();
    paint();
  });
  at("open").addEventListener("click", () => at("file").click());
  at("file").addEventListener("change", () => {
    if (at("file").files.length) stray([...at("file").files]);
    at("file").value = "";
  });
  at("cancel-all").addEventListener("click", () => [...tasks].reverse().forEach(cancel));
  at("forget").addEventListener("click", async () => {
    await store.clear();
    drawHistory();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      paint();
    } else if (event.key === "Escape" && !viewer.dialog.open && tasks.length) {
      event.preventDefault();
      cancel(tasks[0]);
    }
  });
  window.addEventListener("beforeunload", (event) => {
    if (tasks.some(({ id }) => !id)) event.preventDefault(); // only the server keeps its jobs
  });
  await store.open();
  drawHistory();
  say("ready");
  await resume();
}

start();

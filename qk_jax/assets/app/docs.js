// The REST interface as /openapi.json describes it.

import { element } from "./results.js";

const schema = await (await fetch("/openapi.json")).json();
const code = (text) => element("code", {}, text);
const resolved = (given) => (given?.$ref ? schema.components.schemas[given.$ref.split("/").pop()] : given) ?? {};

/** A type in words: 'string or null', 'list of Upload'. */
function typeOf(given) {
  if (given.$ref) return given.$ref.split("/").pop();
  if (given.anyOf) return given.anyOf.map(typeOf).join(" or ");
  if (given.allOf) return given.allOf.map(typeOf).join(" and ");
  if (given.enum) return given.enum.map((word) => JSON.stringify(word)).join(", ");
  if (given.type === "array") return given.items ? `list of ${typeOf(given.items)}` : "list";
  return given.type ?? "anything";
}

function fields(given) {
  const { properties = {}, required = [] } = resolved(given);
  const rows = Object.entries(properties).map(([name, field]) => {
    const preset = required.includes(name) ? "required" : "default" in field ? JSON.stringify(field.default) : "";
    const cells = [code(name), typeOf(field), preset, field.description ?? ""];
    return element("tr", {}, ...cells.map((cell) => element("td", {}, cell)));
  });
  const heads = ["field", "type", "default", "meaning"].map((text) => element("th", { scope: "col" }, text));
  return element("div", { className: "wide" }, element("table", {}, element("tr", {}, ...heads), ...rows));
}

function section(method, path, operation) {
  const id = `${method}-${path.replace(/\W+/g, "-")}`;
  const paragraphs = (operation.description ?? "").split("\n\n").filter((text) => text && text !== operation.summary);
  const parts = [
    element("h2", {}, element("b", { className: method }, method.toUpperCase()), " ", code(path)),
    element("p", {}, operation.summary),
    ...paragraphs.map((text) => element("p", { className: "grey" }, text)),
  ];
  const body = operation.requestBody?.content["application/json"]?.schema;
  if (body) parts.push(element("h3", {}, "Body"), fields(body));
  for (const [status, answer] of Object.entries(operation.responses)) {
    const told = answer.content?.["application/json"]?.schema;
    const about = `${status} ${answer.description}${told ? `: ${typeOf(told)}` : ""}`;
    parts.push(element("p", { className: "answer" }, about));
  }
  return element("section", { id }, ...parts);
}

const main = document.querySelector("#paths");
for (const [path, methods] of Object.entries(schema.paths)) {
  for (const [method, operation] of Object.entries(methods)) main.append(section(method, path, operation));
}
const hidden = ["HTTPValidationError", "ValidationError"];
const forms = Object.entries(schema.components.schemas).filter(([name]) => !hidden.includes(name));
for (const [name, given] of forms) {
  main.append(element("section", { id: name }, element("h2", {}, name),
    element("p", { className: "grey" }, (given.description ?? "").split("\n\n")[0]), fields(given)));
}

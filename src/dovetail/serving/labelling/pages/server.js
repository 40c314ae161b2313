// Ask the server, and put text on the page as text.

let writeToken = "";

export function useWriteToken(token) {
  writeToken = token;
}

export class Refused extends Error {
  constructor(status, message, hint) {
    super(hint ? `${message}. ${hint}` : message);
    this.status = status;
  }
}

export async function ask(path, body) {
  const options = body === undefined ? {} : {
    method: "POST",
    headers: { "Content-Type": "application/json", "X-Dovetail-Token": writeToken },
    body: JSON.stringify(body),
  };
  let response;
  try {
    response = await fetch(`api/${path}`, options);
  } catch {
    throw new Refused(0, "The server does not answer", "Nothing is lost on this page: try again");
  }
  const said = await response.json().catch(() => ({}));
  if (!response.ok) {
    const error = said.error ?? { message: `The server failed (${response.status})` };
    throw new Refused(response.status, error.message, error.hint);
  }
  return said;
}

export const find = (id) => document.getElementById(id);

export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

export function show(id, isShown = true) {
  find(id).hidden = !isShown;
}

export function notice(text) {
  find("notice").textContent = text;
}

export function verdictOf(line) {
  const said = { tie: "tie", both_bad: "all bad", answer: line.chosen }[line.verdict];
  return line.edited === null ? said : `${said}\nbetter: ${line.edited}`;
}

export function cell(text, head, className = "") {
  const made = make("td", { className: `text ${className}`, textContent: text ?? "" });
  made.dataset.head = head;
  return made;
}

export function number(value, digits) {
  return value === null ? "undefined" : value.toFixed(digits);
}

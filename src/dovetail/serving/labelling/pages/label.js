// The labelling page: one task at a time, every action on a key.

import { ask, cell, find, make, notice, show, useWriteToken, verdictOf } from "./server.js";

const POLL_MILLISECONDS = 2000;

let task = null; // as the server gave it
let lookedAt = 0; // milliseconds the task was visible, up to `since`
let since = null; // when the page became visible; null while hidden
let isBusy = false;

function secondsLookedAt() {
  return (lookedAt + (since === null ? 0 : performance.now() - since)) / 1000;
}

document.addEventListener("visibilitychange", () => {
  if (document.hidden && since !== null) {
    lookedAt += performance.now() - since;
    since = null;
  } else if (!document.hidden) {
    since = performance.now();
  }
});

function showProgress(progress) {
  find("progress").textContent =
    `${progress.own_labels} of yours, ${progress.labels} of ${progress.wanted} in all`;
}

function answerCard(text, index) {
  const ratings = make("fieldset", {}, make("legend", { textContent: "Quality" }));
  for (let rating = 1; rating <= 5; rating += 1) {
    const input = make("input", { type: "radio", name: `rating-${index}`, value: String(rating) });
    ratings.append(make("label", {}, input, String(rating)));
  }
  return make("article", { className: "answer" },
    make("div", { className: "role", textContent: `Answer ${index + 1}` }),
    make("div", { className: "text", textContent: text }), ratings);
}

function choiceButton(index) {
  const button = make("button", { className: "main" }, `Answer ${index + 1} `, make("kbd", { textContent: index + 1 }));
  button.dataset.key = String(index + 1);
  return button;
}

function startButton(text, index) {
  const button = make("button", { type: "button", textContent: `answer ${index + 1}` });
  button.addEventListener("click", () => {
    find("edited").value = text;
    find("edited").focus();
  });
  return button;
}

function draw(next) {
  task = next.task;
  showProgress(next.progress);
  show("task", task !== null);
  show("tools");
  for (const button of document.querySelectorAll(".of-task")) button.hidden = task === null;
  if (task === null) {
    const after = next.problem ? `Sampling has ended: ${next.problem}` : "There is nothing left for you to label. Thank you!";
    notice(next.is_waiting ? "New answers are being sampled ..." : after);
    if (next.is_waiting) setTimeout(() => { if (task === null) run(loadNext); }, POLL_MILLISECONDS);
    return;
  }
  find("prompt").replaceChildren(...task.messages.map((turn) => make("div", { className: "turn" },
    make("div", { className: "role", textContent: turn.role }),
    make("div", { className: "text", textContent: turn.content }))));
  find("answers").replaceChildren(...task.answers.map(answerCard));
  find("choices").replaceChildren(...task.answers.map((_, index) => choiceButton(index)));
  find("starts").replaceChildren(...task.answers.map(startButton));
  for (const [box, field] of [["edit", "edited"], ["remark", "note"]]) {
    show(box, false);
    find(field).value = "";
  }
  document.activeElement?.blur();
  showBeginning(find("task"));
  lookedAt = 0;
  since = document.hidden ? null : performance.now();
}

// Whoever read the last task to its end looks at the end of the page.
function showBeginning(element) {
  const { top } = element.getBoundingClientRect();
  if (top < 0 || top > innerHeight / 2) element.scrollIntoView({ block: "start" });
}

async function loadNext() {
  draw(await ask("next", {}));
  drawHistory();
}

// Nobody waits for it: the next verdict may come first.
function drawHistory() {
  listLabels().catch((error) => notice(error.message));
}

async function listLabels() {
  const lines = await ask("labels");
  show("history", lines.length > 0);
  find("lines").replaceChildren(...lines.map((line) => make("tr", { className: line.void === null ? "" : "void" },
    cell(line.void === null ? line.id : `${line.id} (${line.void})`, "Label"), cell(line.prompt, "Prompt"),
    cell(verdictOf(line), "Verdict", "verdict"), cell(line.note, "Note"))));
}

function ratings() {
  return task.answers.map((_, index) => {
    const chosen = document.querySelector(`input[name="rating-${index}"]:checked`);
    return chosen === null ? null : Number(chosen.value);
  });
}

async function submit(verdict, chosen = null) {
  await ask("labels", {
    assignment_id: task.assignment_id,
    verdict,
    chosen,
    ratings: ratings(),
    edited: find("edited").value.trim() === "" ? null : find("edited").value,
    note: find("note").value.trim() === "" ? null : find("note").value,
    seconds: secondsLookedAt(),
  });
  await loadNext();
}

async function skip() {
  await ask("skip", { assignment_id: task.assignment_id });
  await loadNext();
}

async function undo() {
  draw(await ask("undo", {}));
  notice("Your newest label is undone: here is its task again.");
  drawHistory();
}

function open(box, field) {
  show(box);
  find(field).focus();
}

function rate() {
  document.querySelector("#answers input")?.focus();
}

function help() {
  const dialog = find("help");
  if (dialog.open) dialog.close();
  else dialog.showModal();
}

function actionOf(key) {
  if (key === "?") return help;
  if (key === "u") return () => run(undo);
  if (task === null) return null;
  if (/^[1-9]$/.test(key) && Number(key) <= task.answers.length) return () => run(() => submit("answer", Number(key) - 1));
  return {
    t: () => run(() => submit("tie")),
    b: () => run(() => submit("both_bad")),
    s: () => run(skip),
    e: () => open("edit", "edited"),
    n: () => open("remark", "note"),
    r: rate,
  }[key] ?? null;
}

async function run(action) {
  if (isBusy) return; // a key pressed twice is one label
  isBusy = true;
  notice("");
  try {
    await action();
  } catch (error) {
    notice(error.message);
    if (error.status === 401) askForToken();
    if (error.status === 404 || error.status === 409) await loadNext().then(() => notice(error.message)).catch(() => {});
  } finally {
    isBusy = false;
  }
}

document.addEventListener("keydown", (event) => {
  const isTyping = event.target.matches("textarea, input:not([type=radio])");
  if (event.key === "Escape" && (isTyping || event.target.matches("input"))) event.target.blur();
  if (isTyping || event.ctrlKey || event.metaKey || event.altKey || event.repeat || find("tools").hidden) return;
  if (find("help").open && event.key !== "?") return;
  const action = actionOf(event.key);
  if (action === null) return;
  event.preventDefault();
  action();
});

document.addEventListener("click", (event) => {
  const button = event.target.closest("button[data-key]");
  if (button !== null) actionOf(button.dataset.key)?.();
});

function askForToken() {
  for (const id of ["task", "tools", "guidelines", "history", "logout", "to-admin"]) show(id, false);
  show("login");
  find("token").focus();
}

async function enter() {
  const me = await ask("me");
  useWriteToken(me.write_token);
  find("project").textContent = me.project;
  find("name").textContent = me.name;
  find("guidelines-text").textContent = me.guidelines;
  show("guidelines", me.guidelines !== "");
  if (matchMedia("(max-width: 40rem)").matches) find("guidelines").open = false;
  show("to-admin", me.is_admin);
  show("logout");
  show("login", false);
  await loadNext();
}

async function logIn(token) {
  await ask("login", { token });
  await enter();
}

find("login").addEventListener("submit", (event) => {
  event.preventDefault();
  const token = find("token").value.trim();
  find("token").value = "";
  run(() => logIn(token));
});

find("logout").addEventListener("click", () => run(async () => {
  await ask("logout", {});
  location.reload();
}));

const invited = new URLSearchParams(location.hash.slice(1)).get("token");
if (invited !== null) history.replaceState(null, "", location.pathname);
run(invited === null ? enter : () => logIn(invited));

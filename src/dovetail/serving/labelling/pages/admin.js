// The admin page: figures, labels, invitations.

import { ask, cell, find, make, notice, number, show, useWriteToken, verdictOf } from "./server.js";

let own = ""; // the name of the admin who looks at this
let oldest = null; // the id of the last label that is listed

async function run(action) {
  notice("");
  try {
    await action();
  } catch (error) {
    notice(error.message);
  }
}

async function drawOverview() {
  const all = await ask("admin/overview");
  const count = (verdict) => all.verdicts[verdict] ?? 0;
  find("progress").textContent = `${all.progress.labels} of ${all.progress.wanted} labels. ` +
    `One answer best: ${count("answer")}, tie: ${count("tie")}, all bad: ${count("both_bad")}`;
  find("fleiss").textContent = `Fleiss' kappa: ${number(all.fleiss, 3)}, over ${all.shared_tasks} tasks with two labels or more`;
  find("pairs").replaceChildren(...all.pairs.map((pair) => make("tr", {},
    cell(`${pair.first} and ${pair.second}`, "Annotators"), cell(pair.tasks, "Tasks both labelled"),
    cell(`${Math.round(100 * pair.agreement)} %`, "Same verdict"), cell(number(pair.kappa, 3), "Cohen's kappa"))));
  find("speeds").replaceChildren(...all.speeds.map((person) => make("tr", {},
    cell(person.is_admin ? `${person.name} (admin)` : person.name, "Name"), cell(person.labels, "Labels"),
    cell(person.median_seconds === null ? "" : person.median_seconds.toFixed(1), "Median seconds"),
    cell(person.links, "Links"), make("td", {}, ...revokeButtons(person)))));
}

function revokeButtons(person) {
  if (person.links === 0 || person.name === own) return [];
  const button = make("button", { textContent: "Revoke links" });
  button.addEventListener("click", () => run(async () => {
    if (!confirm(`Let nobody in under the name ${person.name} any more? Labels stay.`)) return;
    await ask("admin/annotators/revoke", { name: person.name });
    await drawOverview();
  }));
  return [button];
}

function row(line) {
  const last = make("td");
  if (line.void === null) {
    const button = make("button", { textContent: "Void" });
    button.addEventListener("click", () => askForReason(line.id));
    last.append(button);
  } else {
    last.textContent = line.void;
  }
  return make("tr", { className: line.void === null ? "" : "void" },
    cell(line.id, "Label"), cell(line.annotator, "Annotator"), cell(line.prompt, "Prompt"),
    cell(verdictOf(line), "Verdict", "verdict"), cell(line.note, "Note"), cell(line.seconds.toFixed(1), "Seconds"), last);
}

async function drawLines(before) {
  const lines = await ask(before === null ? "admin/labels" : `admin/labels?before=${before}`);
  if (before === null) find("lines").replaceChildren();
  find("lines").append(...lines.map(row));
  oldest = lines.at(-1)?.id ?? null;
  show("older", oldest !== null && oldest > 1);
}

function askForReason(id) {
  find("void-id").textContent = id;
  find("reason").value = "";
  find("void").showModal();
}

find("void-form").addEventListener("submit", () => run(async () => {
  await ask(`admin/labels/${find("void-id").textContent}/void`, { reason: find("reason").value });
  await drawOverview();
  await drawLines(null);
}));
find("keep").addEventListener("click", () => find("void").close());
find("older").addEventListener("click", () => run(() => drawLines(oldest)));

find("invite").addEventListener("submit", (event) => {
  event.preventDefault();
  run(async () => {
    const invited = await ask("admin/annotators", { name: find("new-name").value });
    find("new-name").value = "";
    find("link").textContent = new URL(`./#token=${invited.token}`, location.href).href;
    show("invitation");
    await drawOverview();
  });
});

run(async () => {
  const me = await ask("me");
  useWriteToken(me.write_token);
  find("project").textContent = me.project;
  find("name").textContent = own = me.name;
  await drawOverview();
  await drawLines(null);
  show("all");
});

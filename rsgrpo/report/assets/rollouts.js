
const viewer = document.getElementById("viewer");
const chosen = { view: 0, group: 0, term: 0 };
const NET = "all together";

function viewName(view) {
  return view.split === "val" ? `validation ${view.step}` : `step ${view.step}`;
}

function choice(label, options, selected, onchoose) {
  const buttons = options.map((text, index) =>
    make("button", { type: "button", "aria-pressed": String(index === selected), onclick: () => onchoose(index) }, text));
  return make("div", { class: "tool" }, make("span", {}, label), make("div", { class: "choice" }, ...buttons));
}

// Advantages of one rollout, by token; null is outside the scope. The last entry is the weighted sum of all terms.
function advantages(view, rollout) {
  const dense = rollout.terms.map((runs) => {
    const values = new Array(rollout.ids.length).fill(null);
    for (const [start, end, advantage] of runs) values.fill(advantage, start, end);
    return values;
  });
  const net = rollout.ids.map((_, token) => dense.reduce((sum, values, k) =>
    values[token] === null ? sum : (sum ?? 0) + (report.weights[view.terms[k]] ?? 1) * values[token], null));
  return dense.length > 1 ? [...dense, net] : dense;
}

function colour(advantage, limit) {
  const strength = Math.min(1, Math.abs(advantage) / limit) * 0.62;
  return advantage === 0 ? "" : `background:rgba(var(--${advantage > 0 ? "up" : "down"}),${strength.toFixed(3)})`;
}

function tokenSpans(view, rollout, limit) {
  const characters = Array.from(rollout.text); // spans count code points, JavaScript counts UTF-16 units
  const rows = advantages(view, rollout);
  const names = rows.length > 1 ? [...view.terms, NET] : view.terms;
  const values = rows[chosen.term];
  const nodes = [];
  const read = [...rollout.observations];
  const readUpTo = (token) => { while (read.length && read[0].at <= token) nodes.push(observationBlock(read.shift())); };
  let cursor = 0;
  rollout.ids.forEach((id, token) => {
    readUpTo(token);
    const start = rollout.starts[token], end = rollout.ends[token];
    if (start > cursor) nodes.push(characters.slice(cursor, start).join(""));
    const own = characters.slice(start, end).join("");
    const last = start === end && start >= characters.length;
    const shown = characters.slice(Math.max(start, cursor), end).join("");
    cursor = Math.max(cursor, end);
    const value = values ? values[token] : null;
    const describe = (event) => {
      const lines = [last ? "end of text" : JSON.stringify(own), `token ${token}, id ${id}`];
      if (rollout.logprobs[token] !== undefined) lines.push(`log p ${fixed(rollout.logprobs[token])}  (p ${fixed(Math.exp(rollout.logprobs[token]))})`);
      rows.forEach((row, k) => lines.push(`${names[k]}: ${row[token] === null ? "outside the scope" : signed(row[token])}`));
      showTip(event, lines.join("\n"));
    };
    const span = make("span", { onmousemove: describe, onmouseleave: hideTip, style: value === null ? "" : colour(value, limit) }, last ? "end" : shown || "·");
    span.className = (value === null ? "out " : "") + (last || !shown ? "mark" : "");
    nodes.push(span);
  });
  if (cursor < characters.length) nodes.push(characters.slice(cursor).join(""));
  readUpTo(rollout.ids.length);
  return make("div", { class: "tokens" }, ...nodes);
}

// What an environment wrote behind a turn, its images in the places where the policy sees them.
function observationBlock(observation) {
  const notes = Object.entries(observation.facts).map(([key, value]) => `${key}: ${typeof value === "string" ? value : JSON.stringify(value)}`);
  const kind = observation.tokens ? `observation, ${observation.tokens} tokens` : "end of the episode";
  const head = [kind, ...(observation.fault ? [observation.fault] : []), ...notes].join("  ·  ");
  const pieces = observation.text.split("<image>");
  const nodes = pieces.flatMap((piece, index) => {
    const source = observation.images[index - 1];
    return index && source !== undefined ? [thumbnail(source, index - 1, "image"), piece] : [piece];
  });
  return make("div", { class: `observation${observation.fault ? " miss" : ""}` }, make("div", { class: "quiet" }, head), ...nodes);
}

function thumbnail(source, index, kind) {
  const uri = report.images[source], name = `${kind} ${index + 1}`;
  if (!uri) return make("div", { class: "thumb", title: source }, make("span", {}, `${name}: file is gone`));
  const zoom = () => {
    const dialog = document.getElementById("zoom");
    const image = dialog.querySelector("img");
    image.onload = () => image.classList.toggle("tiny", image.naturalWidth < 200);
    image.src = uri;
    dialog.querySelector("p").textContent = `${name}  ·  ${source}`;
    dialog.showModal();
  };
  return make("button", { type: "button", class: "thumb", title: source, onclick: zoom }, make("img", { src: uri, alt: name }), make("span", {}, name));
}
document.getElementById("zoom").addEventListener("click", (event) => event.currentTarget.close());

function goldText(value) {
  if (Array.isArray(value)) return value.map((item, index) => (value.length > 1 ? `[${index + 1}] ` : "") + (typeof item === "string" ? item : JSON.stringify(item))).join("\n");
  return typeof value === "string" ? value : JSON.stringify(value);
}

function promptPanel(group) {
  const panel = make("div", { class: "panel" }, make("h4", {}, "Question"), make("div", { class: "question" }, group.question));
  if (group.images.length) panel.append(make("h4", {}, "Pages"), make("div", { class: "thumbs" }, ...group.images.map((source, index) => thumbnail(source, index, "page"))));
  const truth = Object.entries(group.truth);
  const gold = truth.filter(([key]) => key === "answers" || key === "evidence");
  for (const [key, value] of gold) panel.append(make("h4", {}, key === "answers" ? "Gold answer" : "Gold evidence"), make("div", { class: "gold" }, goldText(value)));
  const rest = truth.filter(([key]) => key !== "answers" && key !== "evidence");
  if (rest.length) panel.append(make("details", {}, make("summary", {}, "Other columns"), make("div", { class: "gold" }, rest.map(([key, value]) => `${key}: ${goldText(value)}`).join("\n"))));
  panel.append(make("h4", {}, "Prompt"), make("div", { class: "gold quiet" }, group.id + (group.mode ? `  (${group.mode})` : "")));
  return panel;
}

function rolloutPanel(view, rollout, index, limit) {
  const term = view.terms[chosen.term];
  const chips = rollout.rewards.map((reward) => {
    const note = reward.missed ? "a scope marker is missing" : reward.score === null ? "did not apply" : "";
    return make("span", { class: `chip${reward.name === term ? " on" : ""}${reward.missed ? " miss" : ""}`, title: note }, reward.name, make("b", {}, fixed(reward.score, 2)));
  });
  chips.push(...rollout.monitors.map(([name, value]) => make("span", { class: "chip quiet", title: "monitor: never trained on" }, name, make("b", {}, fixed(value, 2)))));
  const turns = 1 + rollout.observations.filter((observation) => observation.at < rollout.ids.length).length;
  const length = `${rollout.ids.length} tokens${turns > 1 ? ` in ${turns} turns` : ""}${rollout.truncated ? ", cut at the limit" : ""}`;
  return make("div", { class: "panel rollout" }, make("div", { class: "rollout-head" }, make("b", {}, `Rollout ${index + 1}`), ...chips, make("span", {}, length)), tokenSpans(view, rollout, limit));
}

function drawViewer() {
  viewer.replaceChildren();
  if (!report.views.some((view) => view.groups.length)) {
    viewer.append(make("p", { class: "empty" }, "No rollouts are stored in this run (tracking.store_rollouts, or no step is finished yet)."));
    return;
  }
  const view = report.views[chosen.view];
  const names = view.terms.length > 1 ? [...view.terms, NET] : view.terms;
  chosen.term = Math.min(chosen.term, Math.max(0, names.length - 1));
  chosen.group = Math.min(chosen.group, Math.max(0, view.groups.length - 1));
  const group = view.groups[chosen.group];
  const tools = make("div", { class: "tools" }, choice("rollouts of", report.views.map(viewName), chosen.view, (index) => { chosen.view = index; drawViewer(); }));
  const move = (by) => () => { chosen.group = (chosen.group + by + view.groups.length) % view.groups.length; drawViewer(); };
  tools.append(make("div", { class: "tool" }, make("span", {}, "group"), make("div", { class: "choice" },
    make("button", { type: "button", "aria-label": "previous group", onclick: move(-1) }, "‹"),
    make("span", { class: "count" }, `${chosen.group + 1} of ${view.groups.length}` + (view.num_groups > view.groups.length ? ` (${view.num_groups} in all)` : "")),
    make("button", { type: "button", "aria-label": "next group", onclick: move(1) }, "›"))));
  if (names.length) tools.append(choice("taught by", names, chosen.term, (index) => { chosen.term = index; drawViewer(); }));
  viewer.append(tools);
  if (!group) {
    viewer.append(make("p", { class: "empty" }, "This step has no rollouts."));
    return;
  }
  const used = view.groups.flatMap((each) => each.rollouts.flatMap((rollout) => (advantages(view, rollout)[chosen.term] || []).filter((value) => value !== null).map(Math.abs)));
  const limit = used.reduce((most, value) => Math.max(most, value), 0) || 1;
  if (names.length) tools.append(make("div", { class: "scale" }, fixed(-limit, 2), make("i"), `+${fixed(limit, 2)}`));
  else viewer.append(make("p", { class: "lead" }, "Validation rollouts teach nothing: they have scores but no advantages."));
  viewer.append(make("div", { class: "split" }, make("div", { class: "side" }, promptPanel(group)),
    make("div", {}, ...group.rollouts.map((rollout, index) => rolloutPanel(view, rollout, index, limit)))));
}

const smoothBox = document.getElementById("smooth");
smoothBox.checked = report.charts.some((chart) => chart.series.some((series) => series.points.length > 30));
smoothBox.addEventListener("change", () => drawCharts(smoothBox.checked));
drawHead();
drawCharts(smoothBox.checked);
drawViewer();
drawConfig();

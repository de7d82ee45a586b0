
const viewer = document.getElementById("viewer");
const chosen = { group: 0, left: 0, right: Math.min(1, report.rules.length - 1) };

function choice(label, options, selected, onchoose) {
  const buttons = options.map((text, index) =>
    make("button", { type: "button", "aria-pressed": String(index === selected), onclick: () => onchoose(index) }, text));
  return make("div", { class: "tool" }, make("span", {}, label), make("div", { class: "choice" }, ...buttons));
}

function tokens(rollout, rule, limit) {
  const characters = Array.from(rollout.text); // spans count code points, JavaScript counts UTF-16 units
  const nodes = [];
  let cursor = 0;
  rollout.starts.forEach((start, token) => {
    const end = rollout.ends[token];
    if (start > cursor) nodes.push(characters.slice(cursor, start).join(""));
    const shown = characters.slice(Math.max(start, cursor), end).join("");
    cursor = Math.max(cursor, end);
    const last = start === end && start >= characters.length;
    const weight = rollout.weights[rule][token];
    const describe = (event) => showTip(event, report.rules.map((name) => `${name}: ${signed(rollout.weights[name][token])}`).join("\n"));
    const strength = Math.min(1, Math.abs(weight) / limit) * 0.62;
    const style = weight ? `background:rgba(var(--${weight > 0 ? "up" : "down"}),${strength.toFixed(3)})` : "";
    const span = make("span", { onmousemove: describe, onmouseleave: hideTip, style }, last ? "end" : shown || "·");
    span.className = last || !shown ? "mark" : "";
    nodes.push(span);
  });
  if (cursor < characters.length) nodes.push(characters.slice(cursor).join(""));
  return make("div", { class: "tokens" }, ...nodes);
}

function draw() {
  viewer.replaceChildren();
  if (!report.groups.length) {
    viewer.append(make("p", { class: "empty" }, "No groups are shown (lab.shown_groups)."));
    return;
  }
  const set = (key) => (index) => { chosen[key] = index; draw(); };
  const group = report.groups[chosen.group];
  viewer.append(make("div", { class: "tools" },
    choice("group", report.groups.map((_, index) => String(index + 1)), chosen.group, set("group")),
    choice("left", report.rules, chosen.left, set("left")),
    choice("right", report.rules, chosen.right, set("right"))));
  viewer.append(make("p", { class: "question" }, group.question));
  const rules = [report.rules[chosen.left], report.rules[chosen.right]];
  const all = group.rollouts.flatMap((rollout) => rules.flatMap((rule) => rollout.weights[rule].map(Math.abs)));
  const limit = all.reduce((most, value) => Math.max(most, value), 0) || 1;
  for (const [index, rollout] of group.rollouts.entries()) {
    const chips = rollout.scores.map(([name, score]) => make("span", { class: "chip" }, name, make("b", {}, fixed(score, 2))));
    const side = (rule) => make("div", { class: "panel" }, make("h4", {}, rule), tokens(rollout, rule, limit));
    viewer.append(make("div", { class: "rollout" },
      make("div", { class: "rollout-head" }, make("b", {}, `Rollout ${index + 1}`), ...chips),
      make("div", { class: "pair" }, ...rules.map(side))));
  }
}
draw();

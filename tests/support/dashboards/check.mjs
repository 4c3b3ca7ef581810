// Checks dashboards/*.json: types of Grafana itself, layout, metric names, and every expression
// by promtool. With `--prometheus URL` also that each expression returns data there.
//
//   node tests/support/dashboards/check.mjs [--prometheus http://127.0.0.1:9090]
//
// Exit code 0: all is well; 1: something is wrong, and said.
import { execFileSync, spawnSync } from "node:child_process";
import { cpSync, mkdirSync, readFileSync, readdirSync, rmSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";

const here = dirname(fileURLToPath(import.meta.url));
const root = join(here, "../../..");
const work = join(root, ".cache/dashboards");
const VARIABLES = {
  "$model": ".*",
  "$phase": ".*",
  "$gpu": ".*",
  "$__rate_interval": "1m",
  "$__range": "1h",
};
// What a simulated GPU does not report.
const MAY_BE_EMPTY = /orchestrator_gpu_utilization_ratio/;

const wrong = [];
const names = readdirSync(join(root, "dashboards")).filter((name) => name.endsWith(".json"));
const dashboards = names.map((name) => {
  const text = readFileSync(join(root, "dashboards", name), "utf8");
  return { name: name.replace(/\.json$/, ""), text, json: JSON.parse(text) };
});
if (dashboards.length === 0) wrong.push("dashboards/ holds no dashboard");

function expressions({ name, json }) {
  return json.panels.flatMap((panel) =>
    (panel.targets ?? []).map((target) => {
      let expr = target.expr;
      for (const [variable, value] of Object.entries(VARIABLES)) {
        expr = expr.replaceAll(variable, value);
      }
      if (expr.includes("$")) wrong.push(`${name}: ${panel.title}: unknown variable in ${expr}`);
      return { where: `${name}: ${panel.title} ${target.refId}`, expr };
    }),
  );
}

function checkTypes() {
  mkdirSync(work, { recursive: true });
  for (const file of ["package.json", "package-lock.json", "types.ts"]) {
    cpSync(join(here, file), join(work, file));
  }
  const installed = spawnSync("npm", ["ls", "--silent"], { cwd: work }).status === 0;
  if (!installed) execFileSync("npm", ["ci", "--no-audit", "--no-fund"], { cwd: work, stdio: "inherit" });
  const files = dashboards.map(({ name, text }) => {
    const file = `${name}.check.ts`;
    const source = `import type { Checked } from "./types";\nexport default ${text.trim()} satisfies Checked;\n`;
    writeFileSync(join(work, file), source);
    return file;
  });
  const tsc = join(work, "node_modules/typescript/bin/tsc");
  const options = ["--noEmit", "--strict", "--skipLibCheck", "--module", "esnext", "--moduleResolution", "bundler", "--target", "es2022"];
  const ran = spawnSync(process.execPath, [tsc, ...options, ...files], { cwd: work, encoding: "utf8" });
  if (ran.status !== 0) wrong.push(`tsc: ${ran.stdout}${ran.stderr}`);
}

function checkLayout({ name, json }) {
  const ids = json.panels.map((panel) => panel.id);
  if (new Set(ids).size !== ids.length) wrong.push(`${name}: two panels have one id`);
  json.panels.forEach((a, i) => {
    const A = a.gridPos;
    if (A.x + A.w > 24) wrong.push(`${name}: ${a.title} is wider than the page`);
    for (const b of json.panels.slice(i + 1)) {
      const B = b.gridPos;
      const apart = A.x + A.w <= B.x || B.x + B.w <= A.x || A.y + A.h <= B.y || B.y + B.h <= A.y;
      if (!apart) wrong.push(`${name}: ${a.title} and ${b.title} overlap`);
    }
  });
}

// Every metric that is drawn is one that Wharf has.
function checkNames(all) {
  const source = readFileSync(join(root, "src/telemetry/metrics.rs"), "utf8");
  const known = new Set(source.match(/"(?:orchestrator|swapper)_[a-z_]+"/g).map((s) => s.slice(1, -1)));
  for (const { where, expr } of all) {
    for (const used of expr.match(/\b(?:orchestrator|swapper)_[a-z_]+\b/g) ?? []) {
      if (!known.has(used) && !known.has(used.replace(/_(bucket|sum|count)$/, ""))) {
        wrong.push(`${where}: there is no metric ${used}`);
      }
    }
  }
}

function checkExpressions(all) {
  const rules = all.map(({ expr }, i) => `  - record: dashboard:expression_${i}\n    expr: ${JSON.stringify(expr)}`);
  const file = join(work, "rules.yml");
  writeFileSync(file, `groups:\n- name: dashboards\n  rules:\n${rules.join("\n")}\n`);
  const ran = spawnSync("promtool", ["check", "rules", file], { encoding: "utf8" });
  if (ran.error) wrong.push(`promtool is not installed (Debian: apt-get install prometheus): ${ran.error.message}`);
  else if (ran.status !== 0) wrong.push(`promtool: ${ran.stdout}${ran.stderr}`);
  rmSync(file);
}

async function checkData(all, prometheus) {
  for (const { where, expr } of all) {
    const url = `${prometheus}/api/v1/query?query=${encodeURIComponent(expr)}`;
    const answer = await (await fetch(url)).json();
    if (answer.status !== "success") wrong.push(`${where}: ${answer.error}`);
    else if (answer.data.result.length > 0) console.log(`${String(answer.data.result.length).padStart(4)} series  ${where}`);
    else if (MAY_BE_EMPTY.test(expr)) console.log(`   no data  ${where} (allowed)`);
    else wrong.push(`${where}: no data for ${expr}`);
  }
}

const all = dashboards.flatMap(expressions);
checkTypes();
dashboards.forEach(checkLayout);
checkNames(all);
checkExpressions(all);
const at = process.argv.indexOf("--prometheus");
if (at > 0) await checkData(all, process.argv[at + 1]);
wrong.forEach((line) => console.error(line));
console.log(`${dashboards.length} dashboards, ${all.length} expressions: ${wrong.length === 0 ? "all well" : `${wrong.length} wrong`}`);
process.exit(wrong.length === 0 ? 0 : 1);

// npm run tables: fills the generated tables of the READMEs. A table stands between `<!-- table: NAME -->` and
// `<!-- end of table -->`; what is between is written from the code, and a test fails when it is out of date.
import { existsSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { pathToFileURL } from "node:url";
import { root } from "./child.mjs";
import { type Package, readPackages } from "./workspace.ts";

/** What a router's file says about it: RouterCard of @switchyard/routers. */
interface RouterCard {
  readonly name: string;
  readonly title: string;
  readonly paper: string;
  readonly equations: string;
  readonly needs: readonly string[];
  readonly causal: string;
  readonly plans: readonly string[];
  readonly params: string;
  readonly cost: string;
  readonly claim: string;
  readonly ourChoices: readonly string[];
}

type Rows = readonly (readonly string[])[];

/** The generated parts by name, as Markdown. */
const tables: Readonly<Record<string, () => string | Promise<string>>> = {
  packages: () =>
    table([
      ["package", "what it does"],
      ...published().map(({ folder, manifest }) => [`[\`${manifest.name}\`](${folder})`, manifest.description ?? ""]),
    ]),
  routers: async () =>
    table([
      ["router", "method", "paper", "causal", "plan", "parameters", "cost per token beside the experts", "needs"],
      ...(await routerCards()).map((card) => [
        `\`${card.name}\``,
        card.title,
        `[${card.paper}](https://arxiv.org/abs/${card.paper})`,
        card.causal,
        card.plans.join(", "),
        card.params,
        card.cost,
        card.needs.join(", ") || "nothing",
      ]),
    ]),
  "router-notes": async () =>
    (await routerCards())
      .map(({ name, equations, claim, ourChoices }) =>
        [`- **${name}** (${equations}). The paper: ${claim}.`, `Here: ${ourChoices.join("; ")}.`].join(" "),
      )
      .join("\n"),
};

/** One file of the repository that may hold tables. */
export interface Readme {
  readonly path: string;
  readonly text: string;
}

export function readmes(): Readme[] {
  const paths = ["README.md", ...published().map(({ folder }) => `${folder}/README.md`)];
  return paths
    .filter((path) => existsSync(join(root, path)))
    .map((path) => ({ path, text: readFileSync(join(root, path), "utf8") }));
}

/** The text with every table written anew. Throws when a table is unknown or not closed. */
export async function filled({ path, text }: Readme): Promise<string> {
  let result = text;
  for (const [opening, name = ""] of text.matchAll(/^<!-- table: (\S+) -->$/gm)) {
    const part = tables[name];
    if (!part) throw new Error(`${path}: no table "${name}"; the tables are ${Object.keys(tables).join(", ")}`);
    const start = result.indexOf(opening) + opening.length;
    const end = result.indexOf("<!-- end of table -->", start);
    if (end < 0) throw new Error(`${path}: the table "${name}" is not closed by <!-- end of table -->`);
    result = `${result.slice(0, start)}\n${await part()}\n${result.slice(end)}`;
  }
  return result;
}

function table([head = [], ...rows]: Rows): string {
  const line = (cells: readonly string[]): string =>
    `| ${cells.map((cell) => cell.replaceAll("|", "\\|")).join(" | ")} |`;
  return [line(head), line(head.map(() => "---")), ...rows.map(line)].join("\n");
}

function published(): Package[] {
  return readPackages().filter(({ manifest }) => !manifest.private);
}

/** The `card` of every router, from the builds: one router per subpath. */
async function routerCards(): Promise<RouterCard[]> {
  const routers = published().find(({ manifest }) => manifest.name === "@switchyard/routers");
  if (!routers) throw new Error("tables: no package @switchyard/routers");
  const targets = Object.entries(routers.manifest.exports ?? {}).flatMap(([subpath, target]) =>
    subpath !== "." && typeof target === "object" && target.default ? [target.default] : [],
  );
  return Promise.all(
    targets.map(async (target) => {
      const { card } = await import(pathToFileURL(join(root, routers.folder, target)).href);
      if (!card) throw new Error(`tables: ${target} of @switchyard/routers exports no card`);
      return card;
    }),
  );
}

if (process.argv[1] === import.meta.filename) {
  for (const readme of readmes()) {
    const text = await filled(readme);
    if (text === readme.text) continue;
    writeFileSync(join(root, readme.path), text);
    console.log(`wrote ${readme.path}`);
  }
}

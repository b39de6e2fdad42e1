// Who may import whom, checked on data: violations(packages) answers one line per wrong edge or manifest, [] when all is well.
// The directions are those of the architecture: plugins know core, core knows nobody, the command line knows all.
import { posix } from "node:path";
import ts from "typescript";
import type { Manifest, Package, SourceFile } from "./workspace.ts";

type Edges = Readonly<Record<string, readonly string[]>>;

const everything = ["core", "routers", "kernels", "models", "pruning", "bench", "testing", "cli"];

/** Packages that the sources of a package may import. A package that is not named here is an app. */
const allowed: Edges = {
  core: [],
  routers: ["core"],
  kernels: ["core"],
  models: ["core", "routers"],
  pruning: ["core", "models"],
  bench: ["core", "testing"],
  testing: ["core"],
  cli: everything,
};
/** Further packages, of which the sources may import types only. */
const allowedTypes: Edges = { testing: ["models", "pruning"] };
/** Further packages for tests: the shared suites, and real plugins where a package is handed some. */
const allowedTests: Edges = {
  routers: ["testing"],
  kernels: ["testing"],
  models: ["testing", "kernels"],
  pruning: ["testing", "kernels", "routers"],
  bench: ["kernels", "routers", "models"],
};
/** These run everywhere by themselves: no dependency, no built-in module of Node. */
const pure = ["core", "routers"];
const installScripts = ["preinstall", "install", "postinstall", "prepublish", "preprepare", "prepare", "postprepare"];

export function violations(packages: readonly Package[]): string[] {
  const versions = new Map(packages.map((one) => [one.manifest.name, one.manifest.version]));
  return packages.flatMap((one) => [
    ...(one.folder.startsWith("packages/") ? manifestFaults(one, versions) : []),
    ...one.sources.flatMap((file) => fileFaults(one, file).map((fault) => `${one.folder}/${file.path}: ${fault}`)),
  ]);
}

// ------------------------------------------------------------------------------------------------ manifests

function manifestFaults({ folder, manifest, licence }: Package, versions: ReadonlyMap<string, string>): string[] {
  const name = short(manifest.name);
  const faults: string[] = [];
  const expect = (good: boolean, fault: string): void => {
    if (!good) faults.push(`${folder}/package.json: ${fault}`);
  };
  const published = { ...manifest.dependencies, ...manifest.optionalDependencies };
  expect(folder === `packages/${name}`, `the name is ${manifest.name}, the folder ${folder}`);
  expect(manifest.private !== true, "is private, but packages/ holds what is published");
  expect(
    manifest.license === "MIT" && licence?.startsWith("MIT License") === true,
    "needs the MIT licence and its LICENSE file",
  );
  expect(manifest.engines?.node === ">=22", `engines.node is ${manifest.engines?.node}, not >=22`);
  expect(manifest.type === "module" && manifest.sideEffects === false, 'needs type "module" and sideEffects false');
  for (const script of installScripts) {
    expect(manifest.scripts?.[script] === undefined, `the script "${script}" would run when users install the package`);
  }
  if (pure.includes(name)) {
    expect(
      Object.keys(published).length === 0,
      `${name} has no dependencies, found ${Object.keys(published).join(", ")}`,
    );
    const peers = Object.keys(manifest.peerDependencies ?? {}).filter((peer) => short(peer) !== "core");
    expect(peers.length === 0, `${name} has no peer but core, found ${peers.join(", ")}`);
  }
  if (name !== "core" && name !== "cli") {
    expect(
      manifest.peerDependencies?.["@switchyard/core"] !== undefined,
      "core must be a peer dependency: two copies break",
    );
    expect(published["@switchyard/core"] === undefined, "core must be a peer dependency only: two copies break");
  }
  for (const [dependency, range] of Object.entries({ ...published, ...manifest.peerDependencies })) {
    if (!internal(dependency)) continue;
    const to = short(dependency);
    expect(reaches(name, to, allowed) || reaches(name, to, allowedTypes), `${name} must not depend on ${to}`);
    const version = versions.get(dependency);
    if (!version) faults.push(`${folder}/package.json: ${dependency} is not in this repository`);
    else expect(accepts(range, version), `the range of ${dependency} is ${range}, not ^${version}`);
  }
  for (const peer of Object.keys(manifest.peerDependencies ?? {}).filter(internal)) {
    expect(
      manifest.devDependencies?.[peer] === "*",
      `the peer ${peer} must be in devDependencies as "*": turbo orders builds by it`,
    );
  }
  for (const dependency of Object.keys(manifest.devDependencies ?? {}).filter(internal)) {
    const to = short(dependency);
    const good = [allowed, allowedTypes, allowedTests].some((edges) => reaches(name, to, edges));
    expect(good, `${name} must not depend on ${to}, not even for its tests`);
  }
  return faults;
}

// ------------------------------------------------------------------------------------------------ sources

/** One import, export from, import() or import type. */
interface Import {
  readonly to: string;
  readonly typesOnly: boolean;
}

function fileFaults({ folder, manifest }: Package, file: SourceFile): string[] {
  const tree = ts.createSourceFile(file.path, file.text, ts.ScriptTarget.Latest, true);
  const name = short(manifest.name);
  const app = folder.startsWith("apps/");
  const test = /\.test(-util)?\.(ts|mjs)$|^test\//.test(file.path);
  // Only what is in src is shipped; the scripts beside it build the package.
  const tool = test || !file.path.startsWith("src/");
  const faults: string[] = [];

  for (const { to, typesOnly } of imports(tree)) {
    if (to.startsWith(".")) {
      if (posix.join(file.path, "..", to).startsWith(".."))
        faults.push(`imports ${to}, which lies outside its package`);
    } else if (to.startsWith("node:")) {
      if (pure.includes(name) && !tool) faults.push(`imports ${to}, but ${name} runs in browsers too`);
    } else if (internal(to)) {
      const target = short(to);
      if (target === name) {
        if (!test) faults.push(`imports its own package by name (${to}): use a relative path`);
        continue;
      }
      const good =
        app ||
        reaches(name, target, allowed) ||
        (typesOnly && reaches(name, target, allowedTypes)) ||
        (tool && reaches(name, target, allowedTests));
      if (!good) faults.push(`imports ${to}: ${name} may import ${allowed[name]?.join(", ") || "no package"}`);
      else if (!declared(manifest, packageOf(to), tool || app))
        faults.push(`imports ${to}, which its package.json does not name`);
    } else if (!tool && !declared(manifest, packageOf(to), app)) {
      faults.push(`imports ${to}, which its package.json does not name`);
    }
  }

  if (/^src\/(.*\/)?index\.ts$/.test(file.path) && !app) {
    const other = tree.statements.find((statement) => !ts.isExportDeclaration(statement));
    if (other) faults.push(`index.ts only lists exports, found: ${other.getText(tree).split("\n")[0]}`);
  }
  return faults;
}

function imports(tree: ts.SourceFile): Import[] {
  const found: Import[] = [];
  const add = (to: ts.Node | undefined, typesOnly: boolean): void => {
    if (to && ts.isStringLiteralLike(to)) found.push({ to: to.text, typesOnly });
  };
  const visit = (node: ts.Node): void => {
    if (ts.isImportDeclaration(node)) add(node.moduleSpecifier, onlyTypes(node.importClause));
    else if (ts.isExportDeclaration(node)) add(node.moduleSpecifier, node.isTypeOnly);
    else if (ts.isImportTypeNode(node) && ts.isLiteralTypeNode(node.argument)) add(node.argument.literal, true);
    else if (ts.isCallExpression(node) && node.expression.kind === ts.SyntaxKind.ImportKeyword)
      add(node.arguments[0], false);
    ts.forEachChild(node, visit);
  };
  visit(tree);
  return found;
}

/** `import type { A }` and `import { type A, type B }`. */
function onlyTypes(clause: ts.ImportClause | undefined): boolean {
  if (!clause) return false;
  if (clause.isTypeOnly) return true;
  const named = clause.namedBindings;
  return (
    !clause.name && named !== undefined && ts.isNamedImports(named) && named.elements.every((one) => one.isTypeOnly)
  );
}

// ------------------------------------------------------------------------------------------------ names

function internal(specifier: string): boolean {
  return specifier.startsWith("@switchyard/");
}

/** `@switchyard/core/cpu` is `core`. */
function short(specifier: string): string {
  return specifier.split("/")[1] ?? specifier;
}

function packageOf(specifier: string): string {
  return specifier
    .split("/")
    .slice(0, specifier.startsWith("@") ? 2 : 1)
    .join("/");
}

function reaches(from: string, to: string, edges: Edges): boolean {
  return edges[from]?.includes(to) ?? false;
}

/** Does the range `^1.2.3` accept the version? Changesets keeps these ranges, and writes no other form. */
function accepts(range: string, version: string): boolean {
  if (!/^\^\d+\.\d+\.\d+$/.test(range)) return false;
  const wanted = range.slice(1).split(".").map(Number);
  const found = version.split(".").map(Number);
  // The first number that is not 0 must be the same, the rest at least as large.
  const fixed = wanted.findIndex((n) => n > 0);
  const differs = found.findIndex((n, i) => n !== wanted[i]);
  return differs < 0 || (fixed >= 0 && differs > fixed && found[differs]! > wanted[differs]!);
}

function declared(manifest: Manifest, name: string, development: boolean): boolean {
  const { dependencies, peerDependencies, optionalDependencies, devDependencies } = manifest;
  const ranges = {
    ...dependencies,
    ...peerDependencies,
    ...optionalDependencies,
    ...(development ? devDependencies : {}),
  };
  return ranges[name] !== undefined;
}

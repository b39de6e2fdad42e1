// Routers of other people: a file or an installed package that exports a factory, imported when it is named on the command line.
import { createHash } from "node:crypto";
import { existsSync, readFileSync, statSync } from "node:fs";
import { createRequire } from "node:module";
import { dirname, isAbsolute, join } from "node:path";
import { pathToFileURL } from "node:url";
import { UnsupportedError } from "@switchyard/core";
import { pluginFault, type RouterPlugin } from "@switchyard/core/moe";

export interface ForeignRouter {
  readonly plugin: RouterPlugin;
  /** SHA-256 of the file that was imported: a resumed run must find the same. */
  readonly digest: string;
}

interface Request {
  /** As written, for messages. */
  readonly name: string;
  readonly options: { readonly [option: string]: unknown };
}

/** The router that a file exports. @throws UnsupportedError that says why there is none. */
export async function routerOfFile(file: string, request: Request): Promise<ForeignRouter> {
  if (!existsSync(file)) throw new UnsupportedError(`router "${request.name}": there is no file ${file}`);
  if (!statSync(file).isFile()) throw new UnsupportedError(`router "${request.name}": ${file} is not a file`);
  let content: object;
  try {
    content = await import(/* @vite-ignore */ pathToFileURL(file).href);
  } catch (error) {
    throw new UnsupportedError(`router "${request.name}": ${loadFault(error, file)}`, { cause: error });
  }
  const plugin = await pluginOf(content, file, request);
  return { plugin, digest: createHash("sha256").update(readFileSync(file)).digest("hex") };
}

/** The file of an installed package, looked up from the folder; undefined when there is no such package. */
export function fileOfPackage(name: string, folder: string): string | undefined {
  if (!/^(@[\w.~-]+\/)?[\w.~-]+(\/[\w./~-]+)?$/.test(name) || /^\.{1,2}$/.test(name)) return undefined;
  try {
    const found = createRequire(join(folder, "from-here.js")).resolve(name);
    return isAbsolute(found) ? found : undefined; // "assert" is a module of Node
  } catch (error) {
    const code = codeOf(error);
    if (code === "MODULE_NOT_FOUND") return undefined;
    // Packages whose exports have the condition "import" alone.
    const found = code === "ERR_PACKAGE_PATH_NOT_EXPORTED" ? importTarget(name, folder) : undefined;
    if (found !== undefined) return found;
    throw new UnsupportedError(`router "${name}": the package cannot be resolved from ${folder}: ${messageOf(error)}`, {
      cause: error,
    });
  }
}

/** What `exports` of a package's manifest say for `import`. */
function importTarget(name: string, folder: string): string | undefined {
  const parts = name.split("/");
  const own = parts.slice(0, name.startsWith("@") ? 2 : 1).join("/");
  const subpath = name === own ? "." : `.${name.slice(own.length)}`;
  for (let at = folder; ; at = dirname(at)) {
    const manifest = join(at, "node_modules", own, "package.json");
    if (existsSync(manifest)) {
      const { exports }: { exports?: unknown } = JSON.parse(readFileSync(manifest, "utf8"));
      const target = conditional(field(exports, subpath) ?? (subpath === "." ? exports : undefined));
      return target === undefined ? undefined : join(dirname(manifest), target);
    }
    if (at === dirname(at)) return undefined;
  }
}

function conditional(target: unknown): string | undefined {
  if (typeof target !== "object") return typeof target === "string" ? target : undefined;
  for (const condition of ["node", "import", "module-sync", "default"]) {
    const found = conditional(field(target, condition));
    if (found !== undefined) return found;
  }
  return undefined;
}

const field = (value: unknown, name: string): unknown =>
  typeof value === "object" && value !== null ? Object.entries(value).find(([key]) => key === name)?.[1] : undefined;

/** The plugin that a module's factory makes: its default export, the one called "router", or its only function. */
async function pluginOf(content: object, file: string, { name, options }: Request): Promise<RouterPlugin> {
  const refuse = (why: string): never => {
    throw new UnsupportedError(`router "${name}": ${why}`);
  };
  const exported = Object.entries(content);
  const named = (key: string): unknown => exported.find(([own]) => own === key)?.[1];
  const functions = exported.filter(([, value]) => typeof value === "function");
  const candidate = named("default") ?? named("router") ?? (functions.length === 1 ? functions[0]?.[1] : undefined);
  if (candidate === undefined) {
    const found = exported.map(([key]) => key).join(", ") || "nothing";
    refuse(
      `${file} exports ${found}; expected a factory such as defineRouter({ ... }) as default export, under the name "router", ` +
        "or as its only function",
    );
  }
  let made: unknown = candidate;
  if (typeof candidate === "function") {
    try {
      made = await candidate(options);
    } catch (error) {
      const kind = error instanceof Error ? error.name : "a value";
      throw new UnsupportedError(
        `router "${name}": its factory threw ${kind}: ${messageOf(error)}${placeOf(error, file)}`,
        {
          cause: error,
        },
      );
    }
  } else if (Object.keys(options).length > 0) {
    refuse(`${file} exports a plugin, not a factory, so it takes no options; export (options) => plugin`);
  }
  const fault = pluginFault(made);
  if (fault !== undefined) {
    refuse(
      `${typeof candidate === "function" ? "what its factory returned" : "what it exports"} is no router: ${fault}`,
    );
  }
  return made as RouterPlugin;
}

const codeOf = (error: unknown): string | undefined => {
  const code = field(error, "code") ?? (error instanceof Error && "code" in error ? error.code : undefined);
  return typeof code === "string" ? code : undefined;
};
const messageOf = (error: unknown): string => (error instanceof Error ? error.message : String(error));

/** Where in the user's file it happened. */
function placeOf(error: unknown, file: string): string {
  const line = error instanceof Error ? error.stack?.split("\n").find((one) => one.includes(file)) : undefined;
  const [, place] = /:(\d+):\d+\)?$/.exec(line?.trim() ?? "") ?? [];
  return place === undefined ? "" : ` (line ${place} of ${file})`;
}

function loadFault(error: unknown, file: string): string {
  const code = codeOf(error);
  const message = messageOf(error);
  const old = `Node ${process.versions.node} runs no TypeScript; use Node 22.18 or newer, or name the compiled .js file`;
  switch (code) {
    case "ERR_UNKNOWN_FILE_EXTENSION":
      return old;
    case "ERR_UNSUPPORTED_NODE_MODULES_TYPE_STRIPPING":
      return `${file} is TypeScript inside node_modules, which Node does not run; a published package must hold JavaScript`;
    case "ERR_UNSUPPORTED_TYPESCRIPT_SYNTAX":
      return `Node removes types and cannot compile other TypeScript syntax: ${message}; use erasable syntax, or name the compiled .js file`;
    case "ERR_MODULE_NOT_FOUND": {
      const [, missing] = /Cannot find package '([^']+)'/.exec(message) ?? [];
      if (missing !== undefined)
        return `${file} imports ${missing}, which is not installed there; run npm install ${missing}`;
      return `${file} imports a file that is not there: ${message}`;
    }
    default:
      return `${file} cannot be loaded: ${error instanceof Error ? error.name : "error"}: ${message}${placeOf(error, file)}`;
  }
}

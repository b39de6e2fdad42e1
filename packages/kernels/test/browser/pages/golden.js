// Checkpoints with recorded outputs on a page: every tensor of one pass, and greedy tokens.
import {
  chosenFiles,
  directoryFiles,
  generate,
  httpFiles,
  readCheckpoint,
  readModel,
  recordLogits,
} from "@switchyard/models";

/** Downloads files into a folder of the origin private file system. */
async function stored(url, names) {
  const folder = await (await navigator.storage.getDirectory()).getDirectoryHandle("checkpoint", { create: true });
  for (const name of names) {
    const writable = await (await folder.getFileHandle(name, { create: true })).createWritable();
    // The server of these tests gives parts of files only.
    const response = await fetch(url + name, { headers: { Range: "bytes=0-999999999" } });
    if (!response.ok) throw new Error(`${name}: HTTP status ${response.status}`);
    await response.body.pipeTo(writable);
  }
  return folder;
}

/**
 * Where a checkpoint lies: files that were chosen on the page, the address of a folder, or, with `store`, a folder of the
 * origin private file system into which those files of that address are downloaded first.
 */
async function opened({ files, url, store }) {
  if (store) {
    const { open, list } = directoryFiles(await stored(url, store));
    return readCheckpoint(open, "the stored files", { list });
  }
  const { open, list } = files ? chosenFiles(files) : { open: httpFiles(url) };
  return readCheckpoint(open, files ? "the chosen files" : url, list ? { list } : {});
}

async function greedyTokens(model, { prompt, greedy, cache }) {
  const ids = [];
  for await (const { id } of generate(model, { prompt, temperature: 0, maxNew: greedy, cache })) ids.push(id);
  return ids;
}

/**
 * `requests`: { files or url and store, prompt, greedy: tokens to make, memory: bytes for the model }. Answers the tensors by name, the
 * tokens with and without a cache, and what was read of streamed experts.
 */
export async function golden(on, requests) {
  const results = [];
  for (const request of requests) {
    const checkpoint = await opened(request);
    let loaded;
    try {
      const { memory } = request;
      loaded = await readModel(checkpoint, { engine: on, ...(memory === undefined ? {} : { memory }) });
    } catch (error) {
      await checkpoint.close();
      throw error;
    }
    const { model, close } = loaded;
    try {
      const tensors = await recordLogits(model, request.prompt);
      results.push({
        tensors: tensors.map(({ name, data }) => [name, Array.from(data)]),
        cached: await greedyTokens(model, { ...request, cache: true }),
        recomputed: await greedyTokens(model, { ...request, cache: false }),
        streaming: model.streamed?.counts() ?? null,
      });
    } finally {
      await close();
    }
  }
  return { results };
}

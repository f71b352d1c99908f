// Calls of the npm client @huggingface/hub against a loopback Hub, one result a line (run by check_hub_clients.py).
// Arguments: the endpoint and a token. Run it where node finds @huggingface/hub (it resolves from the working directory).
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const require = createRequire(pathToFileURL(`${process.cwd()}/`));
const hub = await import(pathToFileURL(require.resolve("@huggingface/hub")));
const [hubUrl, accessToken] = process.argv.slice(2);
const repo = "org/probe-js";
const access = { repo, hubUrl, accessToken };
const weights = new Uint8Array(256_000).map((_, index) => index % 256);

async function run(call, action) {
  try {
    await action();
    console.log(JSON.stringify({ call, ok: true }));
  } catch (error) {
    console.log(JSON.stringify({ call, ok: false, error: `${error}`.slice(0, 300) }));
  }
}

async function refused(action, status) {
  try {
    await action();
  } catch (error) {
    if (error.statusCode !== status) throw new Error(`status ${error.statusCode} instead of ${status}: ${error}`);
    return;
  }
  throw new Error("was not refused");
}

function equal(value, expected) {
  if (JSON.stringify(value) !== JSON.stringify(expected)) throw new Error(`${JSON.stringify(value)} instead of ${JSON.stringify(expected)}`);
}

async function collect(items) {
  const found = [];
  for await (const item of items) found.push(item);
  return found;
}

let first;
let made;
await run("whoAmI", async () => equal((await hub.whoAmI({ hubUrl, accessToken })).name, "user"));
await run("createRepo", () => hub.createRepo(access));
await run("createRepo again", () => refused(() => hub.createRepo(access), 409));
await run("repoExists", async () => equal(await hub.repoExists(access), true));
await run("modelInfo", async () => {
  first = (await hub.modelInfo({ name: repo, hubUrl, accessToken, additionalFields: ["sha"] })).sha;
});
await run("uploadFiles", async () => {
  made = (
    await hub.uploadFiles({
      ...access,
      useXet: false,
      files: [
        { path: "adapter_config.json", content: new Blob(['{"r": 8}']) },
        { path: "adapter_model.safetensors", content: new Blob([weights]) },
      ],
    })
  ).commit.oid;
});
await run("commit with a stale parent", () =>
  refused(
    () =>
      hub.commit({
        ...access,
        title: "-",
        parentCommit: first,
        operations: [{ operation: "addOrUpdate", path: "x.txt", content: new Blob(["x"]) }],
      }),
    412,
  ),
);
await run("createBranch", () => hub.createBranch({ ...access, branch: "side", revision: made }));
await run("deleteBranch", () => hub.deleteBranch({ ...access, branch: "side" }));
await run("listFiles", async () => equal((await collect(hub.listFiles({ ...access, recursive: true }))).length, 3));
await run("listCommits", async () => equal((await collect(hub.listCommits(access))).length, 2));
await run("fileExists", async () => equal(await hub.fileExists({ ...access, path: "adapter_config.json" }), true));
await run("pathsInfo", async () =>
  equal((await hub.pathsInfo({ ...access, paths: ["adapter_config.json", "no"] })).length, 1),
);
await run("downloadFile", async () => {
  const blob = await hub.downloadFile({ ...access, path: "adapter_config.json", xet: false });
  equal(await blob.text(), '{"r": 8}');
});
await run("downloadFile of an LFS file", async () => {
  const blob = await hub.downloadFile({ ...access, path: "adapter_model.safetensors", xet: false });
  equal(Array.from(new Uint8Array(await blob.arrayBuffer())), Array.from(weights));
});
await run("downloadFile, a range", async () => {
  const blob = await hub.downloadFile({ ...access, path: "adapter_model.safetensors", xet: false });
  equal(Array.from(new Uint8Array(await blob.slice(1000, 1010).arrayBuffer())), Array.from(weights.slice(1000, 1010)));
});
await run("downloadFile, unknown", async () => equal(await hub.downloadFile({ ...access, path: "no" }), null));
await run("deleteFile", () => hub.deleteFile({ ...access, path: "adapter_config.json" }));
await run("deleteRepo", () => hub.deleteRepo(access));

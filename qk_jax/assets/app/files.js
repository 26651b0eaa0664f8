// Files of the page: pictures as base64, the text chunks of PNGs, and what was painted before.

const SIGNATURE = [137, 80, 78, 71, 13, 10, 26, 10];
const KEPT = 120; // pictures of the history

/** The content of a blob in base64. */
export async function base64(blob) {
  const bytes = new Uint8Array(await blob.arrayBuffer());
  let text = "";
  for (let start = 0; start < bytes.length; start += 32768) {
    text += String.fromCharCode(...bytes.subarray(start, start + 32768));
  }
  return btoa(text);
}

/** {keyword: text} of the tEXt and plain iTXt chunks of a PNG; {} of anything else. */
async function chunksOf(blob) {
  const bytes = new Uint8Array(await blob.arrayBuffer());
  if (SIGNATURE.some((byte, index) => bytes[index] !== byte)) return {};
  const view = new DataView(bytes.buffer);
  const found = {};
  for (let start = 8; start + 12 <= bytes.length; ) {
    const length = view.getUint32(start);
    const type = String.fromCharCode(...bytes.subarray(start + 4, start + 8));
    const data = bytes.subarray(start + 8, start + 8 + length);
    const end = data.indexOf(0);
    if (type === "tEXt" && end > 0) {
      found[latin(data.subarray(0, end))] = latin(data.subarray(end + 1));
    } else if (type === "iTXt" && end > 0 && data[end + 1] === 0) {
      const language = data.indexOf(0, end + 3);
      const translated = data.indexOf(0, language + 1);
      if (language > 0 && translated > 0) {
        found[latin(data.subarray(0, end))] = new TextDecoder().decode(data.subarray(translated + 1));
      }
    }
    start += 12 + length;
  }
  return found;
}

const latin = (bytes) => new TextDecoder("latin1").decode(bytes);

/** How a PNG was painted, {prompt, seed, settings}; null of a picture that does not say so. */
export async function recipeOf(blob) {
  const { prompt, seed, settings } = await chunksOf(blob);
  try {
    const known = JSON.parse(settings);
    return typeof known.steps === "number" ? { prompt: prompt ?? "", seed: Number(seed) || 0, settings: known } : null;
  } catch {
    return null;
  }
}

/** Pictures painted before, and the condition pictures of the jobs at work, in this browser's own database; the
    first are kept in memory where it has none. */
export class Store {
  #items = [];
  #base = null;

  async open() {
    this.#base = await new Promise((resolve) => {
      try {
        const asked = indexedDB.open("qk-app", 2);
        asked.onupgradeneeded = () => {
          const base = asked.result;
          if (!base.objectStoreNames.contains("pictures")) base.createObjectStore("pictures", { keyPath: "key" });
          base.createObjectStore("jobs", { keyPath: "id" });
        };
        asked.onsuccess = () => resolve(asked.result);
        asked.onerror = asked.onblocked = () => resolve(null);
      } catch {
        resolve(null);
      }
    });
    const read = this.#base && (await this.#do("pictures", "readonly", (pictures) => pictures.getAll()));
    this.#items = (read ?? []).sort((one, other) => other.key - one.key);
  }

  /** The newest first. */
  all() {
    return this.#items;
  }

  async add(item) {
    this.#items.unshift(item);
    await this.#do("pictures", "readwrite", (pictures) => pictures.put(item));
    for (const old of this.#items.splice(KEPT)) await this.remove(old);
  }

  async remove(item) {
    this.#items = this.#items.filter((other) => other !== item);
    await this.#do("pictures", "readwrite", (pictures) => pictures.delete(item.key));
  }

  async clear() {
    this.#items = [];
    await this.#do("pictures", "readwrite", (pictures) => pictures.clear());
  }

  /** Keeps what a job was given, {source, references} of {name, blob}. */
  async hold(id, given) {
    await this.#do("jobs", "readwrite", (jobs) => jobs.put({ id, ...given }));
  }

  /** What a job was given; null where that is not known. */
  async held(id) {
    return (await this.#do("jobs", "readonly", (jobs) => jobs.get(id))) ?? null;
  }

  async release(id) {
    await this.#do("jobs", "readwrite", (jobs) => jobs.delete(id));
  }

  /** Forgets what was given to all jobs but these. */
  async releaseOthers(ids) {
    const known = (await this.#do("jobs", "readonly", (jobs) => jobs.getAllKeys())) ?? [];
    for (const id of known) if (!ids.includes(id)) await this.release(id);
  }

  async #do(name, mode, action) {
    if (!this.#base) return null;
    return new Promise((resolve) => {
      try {
        const transaction = this.#base.transaction(name, mode);
        const asked = action(transaction.objectStore(name));
        transaction.oncomplete = () => resolve(asked.result); // only now it outlives the page
        transaction.onabort = () => resolve(null); // such as a full disk: the history then ends with the page
      } catch {
        resolve(null); // the base is closed
      }
    });
  }
}

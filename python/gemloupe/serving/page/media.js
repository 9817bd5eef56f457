// Pictures and sounds on their way into a message.

const SOUND = /^audio\//;
const PICTURE = /^image\/(?!svg)/;

// [{kind, name, url}] of files; throws an Error that says in words what can't be taken.
export async function readFiles(files, facts) {
  const made = [];
  for (const file of files) {
    const kind = PICTURE.test(file.type) ? "image" : SOUND.test(file.type) ? "audio" : null;
    if (kind === null) throw new Error(`“${file.name}” is neither a picture nor a sound.`);
    if (kind === "image" && !facts.images) throw new Error("This model reads no pictures.");
    if (kind === "audio" && !facts.audio) throw new Error("This model reads no sounds.");
    // In base64, four characters are three bytes.
    if ((file.size * 4) / 3 > facts.max_body) {
      const most = ((facts.max_body * 3) / 4 / 2 ** 20).toFixed(1);
      throw new Error(`“${file.name}” is too large: this server takes ${most} MiB.`);
    }
    made.push({ kind, name: file.name, url: await dataUrl(file) });
  }
  return made;
}

function dataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error(`“${file.name}” can't be read.`));
    reader.readAsDataURL(file);
  });
}

// A medium as a part of a message.
export function asPart({ kind, url }) {
  if (kind === "image") return { type: "image_url", image_url: { url } };
  const [head, data] = url.split(",", 2);
  const format = /mpeg|mp3/.test(head) ? "mp3" : "wav";
  return { type: "input_audio", input_audio: { data, format } };
}

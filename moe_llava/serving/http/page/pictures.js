// Files of pictures -> data: URLs that the server takes. What is larger than it takes becomes smaller here.
import { Problem } from "./server.js";

const TAKEN = ["image/png", "image/jpeg", "image/webp", "image/gif"];

// {url, name, smaller: whether it was scaled down}
export async function taken(file, limits) {
  const name = file.name || "a pasted picture";
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    throw new Problem(`${name} is no picture that this browser can read.`);
  }
  // As many as may be sent have to fit into one request, in base64.
  const bytes = Math.min(limits.image_bytes, Math.floor((limits.body_bytes * 0.7) / limits.images));
  const fits = file.size <= bytes && bitmap.width * bitmap.height <= limits.pixels;
  const blob = fits && TAKEN.includes(file.type) ? file : await drawn(bitmap, bytes, limits.pixels);
  bitmap.close();
  return { url: await dataUrl(blob), name, smaller: !fits };
}

async function drawn(bitmap, bytes, pixels) {
  for (let most = Math.min(pixels, 4_000_000); most > 1; most /= 2) {
    const scale = Math.min(1, Math.sqrt(most / (bitmap.width * bitmap.height)));
    const canvas = document.createElement("canvas");
    canvas.width = Math.max(1, Math.floor(bitmap.width * scale));
    canvas.height = Math.max(1, Math.floor(bitmap.height * scale));
    const context = canvas.getContext("2d");
    context.fillStyle = "white"; // JPEG has no transparency
    context.fillRect(0, 0, canvas.width, canvas.height);
    context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
    const blob = await new Promise(done => canvas.toBlob(done, "image/jpeg", 0.92));
    if (blob && blob.size <= bytes) return blob;
  }
  throw new Problem("The picture cannot be made small enough for the server.");
}

const dataUrl = blob => new Promise((done, failed) => {
  const reader = new FileReader();
  reader.onload = () => done(reader.result);
  reader.onerror = () => failed(new Problem("The picture cannot be read."));
  reader.readAsDataURL(blob);
});

// Convert image files to data: URLs. Images above the server's limits are scaled down.
import { Problem } from "./server.js";

const ACCEPTED = ["image/png", "image/jpeg", "image/webp", "image/gif"];

// Return {url, name, smaller: it was scaled down}.
export async function encode(file, limits) {
  const name = file.name || "a pasted picture";
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    throw new Problem(`${name} is not a picture that this browser can read.`);
  }
  // The largest number of images must fit into one request, in base64.
  const bytes = Math.min(limits.image_bytes, Math.floor((limits.body_bytes * 0.7) / limits.images));
  const fits = file.size <= bytes && bitmap.width * bitmap.height <= limits.pixels;
  const blob = fits && ACCEPTED.includes(file.type) ? file : await scaledDown(bitmap, bytes, limits.pixels);
  bitmap.close();
  return { url: await dataUrl(blob), name, smaller: !fits };
}

async function scaledDown(bitmap, bytes, pixels) {
  for (let area = Math.min(pixels, 4_000_000); area > 1; area /= 2) {
    const scale = Math.min(1, Math.sqrt(area / (bitmap.width * bitmap.height)));
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

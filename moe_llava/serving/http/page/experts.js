// The panel of experts: patches and tokens in the colours of their first experts.
import { element, make, picture } from "./dom.js";

let routes = null; // the server's response
let layer = 0; // an index of routes.layers
let picked = null; // {part: of routes, token, name}
const parts = new WeakMap(); // field -> the part of routes that it shows

export function showNote(note) {
  element("experts-note").textContent = note;
  element("experts-view").hidden = true;
}

export function show(found) {
  routes = found;
  layer = Math.min(layer, routes.layers.length - 1);
  picked = null;
  element("experts-note").textContent = "The colour and number of a patch or word are those of its first expert in this layer.";
  element("experts-view").hidden = false;
  layOutLayers();
  element("pictures").replaceChildren(...routes.images.map(layOutImage));
  layOutField(element("answer-tokens"), routes.answer, token => `“${visible(routes.answer.tokens[token])}”`, 1);
  draw();
}

const visible = piece => piece.trim() === "" ? JSON.stringify(piece).slice(1, -1).replaceAll(" ", "␣") : piece.trim();

function layOutLayers() {
  const labels = routes.layers.map((number, index) => {
    const label = make("label"), input = make("input");
    input.type = "radio";
    input.name = "layer";
    input.checked = index === layer;
    input.onchange = () => { layer = index; draw(); };
    label.append(input, String(number));
    return label;
  });
  element("layers").replaceChildren(element("layers").querySelector("legend"), ...labels);
}

function layOutImage(image, number) {
  const figure = make("figure"), plain = make("div", "", "plain"), holder = make("div", "", "patches"), grid = make("div", "", "field grid");
  const many = routes.images.length > 1 ? ` of picture ${number + 1}` : "";
  plain.append(picture(image.picture, "what the model sees"), make("figcaption", "what the model sees", "quiet"));
  grid.style.gridTemplate = `repeat(${image.rows}, minmax(0, 1fr)) / repeat(${image.columns}, minmax(0, 1fr))`;
  grid.classList.toggle("fine", image.columns > 16);
  grid.tabIndex = 0;
  grid.setAttribute("role", "group");
  grid.setAttribute("aria-label", `${image.rows} x ${image.columns} patches${many}; arrow keys move`);
  layOutField(grid, image, token => `row ${Math.floor(token / image.columns) + 1}, column ${token % image.columns + 1}${many}`, image.columns);
  holder.append(picture(image.picture, ""), grid);
  figure.append(holder, plain);
  return figure;
}

// Fill a field with cells, one for each token of `part`. `nameOf`: a token's position or text.
function layOutField(field, part, nameOf, columns) {
  const cells = part.experts[0].map((_, token) => {
    const cell = make("span");
    cell.dataset.token = token;
    return cell;
  });
  parts.set(field, part);
  field.replaceChildren(...cells);
  const pick = token => {
    if (token < 0 || token >= cells.length) return;
    picked = { part, token, name: nameOf(token) };
    drawDetail();
  };
  const under = event => { const cell = event.target.closest("[data-token]"); if (cell) pick(Number(cell.dataset.token)); };
  field.onpointerover = field.onclick = under;
  field.onkeydown = event => {
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[event.key];
    if (step === undefined) return;
    event.preventDefault();
    pick(picked?.part === part ? picked.token + step : 0);
  };
}

const fields = () => document.querySelectorAll("#experts .field");

function draw() {
  const counts = routes.colours.map(() => 0);
  for (const field of fields()) {
    for (const cell of field.children) {
      const token = Number(cell.dataset.token), expert = parts.get(field).experts[layer][token][0];
      counts[expert] += 1;
      cell.style.setProperty("--expert", routes.colours[expert]);
      cell.style.setProperty("--ink", routes.inks[expert]);
      if (field.classList.contains("grid")) cell.textContent = expert;
      else cell.replaceChildren(visible(parts.get(field).tokens[token]), make("sub", expert));
    }
  }
  const all = counts.reduce((sum, count) => sum + count, 0);
  element("legend").replaceChildren(...counts.map((count, expert) => {
    const entry = make("span", `expert ${expert}`);
    entry.append(make("b", `${all ? Math.round(100 * count / all) : 0}%`));
    entry.title = "share of these patches and words";
    entry.style.background = routes.colours[expert];
    entry.style.color = routes.inks[expert];
    return entry;
  }));
  drawDetail();
}

// Show the experts and weights of the picked token in this layer, and its first experts in all layers.
function drawDetail() {
  for (const field of fields()) {
    for (const cell of field.children) {
      cell.classList.toggle("picked", picked !== null && picked.part === parts.get(field) && picked.token === Number(cell.dataset.token));
    }
  }
  const detail = element("detail");
  detail.classList.toggle("empty", picked === null);
  if (picked === null) {
    detail.replaceChildren(make("p", "Point at a patch or a word, or tap it, to see all its experts.", "quiet"));
    return;
  }
  const { part, token, name } = picked, bar = make("div", "", "bar");
  const weights = part.experts[layer][token].map((expert, rank) => {
    const weight = part.weights[layer][token][rank], share = make("i", expert);
    share.style.cssText = `flex:${weight};background:${routes.colours[expert]};color:${routes.inks[expert]}`;
    if (weight > 0) bar.append(share);
    return weight > 0 ? `expert ${expert} × ${weight.toFixed(2)}` : `expert ${expert} was full`;
  });
  const path = part.experts.map(tokens => tokens[token][0]).join(" → ");
  detail.replaceChildren(
    make("b", name), bar, make("span", weights.join(" + ")), make("span", `first experts, layer by layer: ${path}`, "quiet"),
  );
}

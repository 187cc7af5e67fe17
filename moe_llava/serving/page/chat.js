// The conversation: turns, each a question with pictures and its answer. The server keeps nothing: all of it is sent with every question.
import { element, make, makeButton, picture, rendered } from "./dom.js";
import * as experts from "./experts.js";
import { taken } from "./pictures.js";
import * as server from "./server.js";

let known = null; // what the server told of itself
let turns = []; // {question, images, answer, state, problem, shortened, draft: the question as it is being changed, article}
let pending = []; // pictures to send with the next question
let reading = 0; // pictures that are being read
let running = null; // ends the answer that is being written
let tracing = null; // ends the request for routes
let shown = null; // the turn whose experts are shown

const WAITING = "waiting", WRITING = "writing", DONE = "done", STOPPED = "stopped", FAILED = "failed";

// What the model reads before it answers the turn at `end`. A question that got no answer is no part of the conversation.
function messages(end) {
  const system = element("system").value.trim();
  const found = system ? [{ role: "system", content: system }] : [];
  turns.slice(0, end + 1).forEach((turn, number) => {
    if (number < end && !answered(turn)) return;
    found.push({ role: "user", content: parts(turn) });
    if (number < end) found.push({ role: "assistant", content: turn.answer });
  });
  return found;
}

const answered = turn => turn.answer !== "" || turn.state === DONE;

function parts(turn) {
  const images = turn.images.map(image => ({ type: "image_url", image_url: { url: image.url } }));
  return turn.question ? [...images, { type: "text", text: turn.question }] : images;
}

// Asking

async function answer(turn) {
  const stopping = new AbortController();
  const body = { model: known.model, messages: messages(turns.indexOf(turn)), temperature: Number(element("temperature").value) };
  if (element("tokens").value) body.max_tokens = Math.max(1, Math.floor(Number(element("tokens").value)));
  Object.assign(turn, { answer: "", state: WAITING, problem: "", shortened: false });
  running = stopping;
  drawAll();
  turn.article.scrollIntoView({ block: "end" });
  try {
    const reason = await server.complete(body, stopping.signal, text => {
      turn.answer += text;
      turn.state = WRITING;
      drawSoon(turn);
    });
    turn.shortened = reason === "length";
    turn.state = DONE;
  } catch (error) {
    turn.state = stopping.signal.aborted ? STOPPED : FAILED;
    if (turn.state === FAILED) turn.problem = plain(error);
    if (error.wrongKey) askForKey(error.message);
  }
  if (running !== stopping) return; // another conversation has begun
  running = null;
  drawAll();
  turn.article.scrollIntoView({ block: "end" });
  if (turn.answer.trim()) showExperts(turn);
}

function plain(error) {
  if (error instanceof server.Problem) return error.message;
  console.error(error);
  return "Something on this page went wrong; the browser's console says what.";
}

function send() {
  const question = element("question").value.trim();
  if (!known || running || reading || (!question && !pending.length)) return;
  const images = pending.length + turns.filter(answered).reduce((sum, turn) => sum + turn.images.length, 0);
  if (images > known.images) {
    element("composer-problem").textContent =
      `The server takes ${known.images} pictures in a conversation, and this would be ${images}: remove some, or begin a new conversation.`;
    return;
  }
  turns.push({ question, images: pending });
  pending = [];
  element("question").value = "";
  element("composer-problem").textContent = "";
  fitQuestion();
  drawThumbnails();
  answer(turns[turns.length - 1]);
}

async function showExperts(turn) {
  tracing?.abort();
  const stopping = tracing = new AbortController();
  shown = turn;
  drawAll();
  if (!known.sparse || element("toggle").getAttribute("aria-pressed") === "false") return;
  experts.tell("Looking at the experts ...");
  const body = { model: known.model, messages: [...messages(turns.indexOf(turn)), { role: "assistant", content: turn.answer }] };
  try {
    experts.show(await server.routes(body, stopping.signal));
  } catch (error) {
    if (!stopping.signal.aborted) experts.tell(plain(error));
  }
}

function forgetExperts() {
  tracing?.abort();
  shown = null;
  experts.tell(known.sparse
    ? "Once there is an answer, the experts that took its tokens and the picture's patches are shown here."
    : "This model is dense: it has no experts to show.");
}

// Drawing

function drawAll() {
  element("welcome").hidden = turns.length > 0 || !known;
  element("messages").replaceChildren(...turns.map(drawTurn));
  element("messages").setAttribute("aria-busy", running !== null);
  drawButtons();
}

function drawButtons() {
  element("send").hidden = running !== null;
  element("stop").hidden = running === null;
  element("send").disabled = !known || reading > 0;
  element("new").disabled = turns.length === 0;
}

function drawTurn(turn) {
  const question = make("div", "", "question"), actions = make("div", "", "actions");
  turn.article = make("article");
  if (turn.images.length) {
    const images = make("div", "", "images");
    images.append(...turn.images.map(image => picture(image.url, image.name)));
    question.append(images);
  }
  if (turn.draft !== undefined) question.append(editor(turn));
  else if (turn.question) question.append(make("p", turn.question));
  if (!running && turn.draft === undefined) actions.append(makeButton("Edit", () => edit(turn), "Edit this question"));
  turn.article.append(question, actions, make("div", "", "answer"));
  drawAnswer(turn);
  return turn.article;
}

function drawAnswer(turn) {
  const place = turn.article.querySelector(".answer"), actions = make("div", "", "actions");
  const last = turn === turns[turns.length - 1];
  place.classList.toggle("waiting", turn.state === WAITING);
  place.replaceChildren(rendered(turn.answer));
  if (turn.state === WAITING) place.append(make("p", "reading ...", "quiet"));
  if (turn.state === DONE && !turn.answer.trim()) place.append(make("p", "The model answered with nothing.", "quiet"));
  if (turn.state === STOPPED) place.append(make("p", "stopped", "quiet"));
  if (!last && !answered(turn)) place.append(make("p", "It got no answer, and the model does not read it again.", "quiet"));
  if (turn.shortened) place.append(make("p", "as long as it may be; more is possible in the settings", "quiet"));
  if (turn.state === FAILED) place.append(make("p", turn.problem, "problem"));
  if (running) return;
  if (last) actions.append(makeButton(turn.state === FAILED ? "Try again" : "Regenerate", () => answer(turn)));
  if (known.sparse && turn.answer.trim()) {
    const button = makeButton("Experts", () => { openExperts(true); showExperts(turn); }, "Show the experts of this answer");
    button.setAttribute("aria-pressed", turn === shown);
    actions.append(button);
  }
  place.append(actions);
}

let drawing = null;

// At most once in a frame. Who has scrolled up to read is left there.
function drawSoon(turn) {
  drawing ??= requestAnimationFrame(() => {
    drawing = null;
    if (!turns.includes(turn)) return;
    const inSight = turn.article.getBoundingClientRect().bottom < innerHeight;
    drawAnswer(turn);
    if (inSight) turn.article.scrollIntoView({ block: "end" });
  });
}

function edit(turn) {
  turn.draft = turn.question;
  drawAll();
  turn.article.querySelector("textarea").focus();
}

function editor(turn) {
  const form = make("form", "", "edit"), text = make("textarea"), row = make("div", "", "row"), ask = make("button", "Ask again", "strong");
  const cancel = () => { delete turn.draft; drawAll(); };
  text.value = turn.draft;
  text.rows = Math.min(8, turn.draft.split("\n").length + 1);
  text.setAttribute("aria-label", "the question, to be changed");
  text.oninput = () => { turn.draft = text.value; };
  text.onkeydown = event => {
    if (event.key === "Escape") cancel();
    submitOnEnter(event, form);
  };
  form.onsubmit = event => {
    event.preventDefault();
    if (running || (!turn.draft.trim() && !turn.images.length)) return;
    turn.question = turn.draft.trim();
    delete turn.draft;
    turns = turns.slice(0, turns.indexOf(turn) + 1);
    forgetExperts();
    answer(turn);
  };
  row.append(make("span", turn === turns[turns.length - 1] ? "" : "What follows it is removed.", "quiet"), makeButton("Cancel", cancel), ask);
  form.append(text, row);
  return form;
}

function submitOnEnter(event, form) {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  form.requestSubmit();
}

// The composer

async function add(files) {
  element("composer-problem").textContent = "";
  for (const file of files) {
    reading += 1;
    drawButtons();
    try {
      pending.push(await taken(file, known));
    } catch (error) {
      element("composer-problem").textContent = plain(error);
    }
    reading -= 1;
    drawThumbnails();
  }
  drawButtons();
  element("question").focus();
}

function drawThumbnails() {
  element("thumbnails").replaceChildren(...pending.map(image => {
    const holder = make("div", "", "thumbnail");
    const remove = makeButton("×", () => { pending = pending.filter(other => other !== image); drawThumbnails(); }, `Remove ${image.name}`);
    holder.append(picture(image.url, image.name), remove);
    if (image.smaller) holder.append(make("small", "scaled down"));
    return holder;
  }));
}

function fitQuestion() {
  const text = element("question");
  text.style.height = "auto";
  text.style.height = `${Math.min(text.scrollHeight + 2, 200)}px`;
}

function openExperts(open) {
  element("toggle").setAttribute("aria-pressed", open);
  document.body.classList.toggle("without-experts", !open);
}

function askForKey(problem) {
  element("key-form").hidden = false;
  element("key-problem").textContent = problem;
  element("key").focus();
}

async function begin() {
  try {
    known = await server.settings();
  } catch (error) {
    element("welcome").hidden = true;
    if (error.wrongKey) askForKey(server.hasKey() ? error.message : "");
    else element("messages").replaceChildren(make("p", plain(error), "problem"), makeButton("Try again", begin));
    return;
  }
  element("key-form").hidden = true;
  element("model").textContent = document.title = known.model;
  element("tokens").placeholder = known.new_tokens;
  if (!turns.length) forgetExperts();
  drawAll();
  element("question").focus();
}

element("key-form").onsubmit = event => {
  event.preventDefault();
  server.setKey(element("key").value.trim());
  begin();
};
element("composer").onsubmit = event => { event.preventDefault(); send(); };
element("question").onkeydown = event => submitOnEnter(event, element("composer"));
element("question").oninput = fitQuestion;
element("attach").onclick = () => element("files").click();
element("files").onchange = () => { add([...element("files").files]); element("files").value = ""; };
element("stop").onclick = () => running?.abort();
element("new").onclick = () => {
  running?.abort();
  running = null;
  turns = [];
  forgetExperts();
  drawAll();
  element("question").focus();
};
element("toggle").onclick = () => {
  const open = element("toggle").getAttribute("aria-pressed") === "false";
  openExperts(open);
  if (open && shown) showExperts(shown);
};
element("temperature").oninput = () => { element("temperature-value").textContent = element("temperature").value; };
document.addEventListener("click", event => {
  if (!element("settings").contains(event.target)) element("settings").open = false;
});
document.addEventListener("paste", event => {
  const files = [...event.clipboardData.files];
  if (!files.length || !known) return;
  event.preventDefault();
  add(files);
});
for (const kind of ["dragenter", "dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, event => {
    if (!event.dataTransfer?.types.includes("Files")) return;
    event.preventDefault();
    document.body.classList.toggle("dropping", kind === "dragenter" || kind === "dragover");
    if (kind === "drop" && known) add([...event.dataTransfer.files]);
  });
}
begin();

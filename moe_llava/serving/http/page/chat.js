// The conversation: turns, each a question with pictures and its answer. The server keeps nothing: all of it is sent with every question.
import { element, make, makeButton, picture, rendered } from "./dom.js";
import * as experts from "./experts.js";
import { taken } from "./pictures.js";
import * as server from "./server.js";

let known = null; // what the server told of itself
let turns = []; // {question, images, answer, state, problem, shortened, routes: of the answer, once they were asked for, article}
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
  Object.assign(turn, { answer: "", state: WAITING, problem: "", shortened: false, routes: null });
  running = stopping;
  drawAnswer(turn);
  drawButtons();
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
  follow(turn);
  if (known.sparse && turn.answer.trim()) showExperts(turn);
}

function askAgain(turn) {
  forgetExperts();
  answer(turn);
}

function plain(error) {
  if (error instanceof server.Problem) return error.message;
  console.error(error);
  return "Something on this page went wrong; the browser's console says what.";
}

const nothingToSend = () => !element("question").value.trim() && !pending.length;

function send() {
  const question = element("question").value.trim();
  if (!known || running || reading || nothingToSend()) return;
  const images = pending.length + turns.filter(answered).reduce((sum, turn) => sum + turn.images.length, 0);
  if (images > known.images) {
    const most = known.images === 1 ? "1 picture" : `${known.images} pictures`;
    element("composer-problem").textContent =
      `The server takes ${most} in a conversation, and this would be ${images}: remove some, or begin a new conversation.`;
    return;
  }
  const turn = { question, images: pending };
  layOut(turn);
  turns.push(turn);
  element("question").value = "";
  fitQuestion();
  clearPending();
  drawTurns();
  answer(turn);
}

async function showExperts(turn) {
  choose(turn);
  if (element("toggle").getAttribute("aria-pressed") === "false") return;
  if (turn.routes) {
    experts.show(turn.routes);
    return;
  }
  const stopping = tracing = new AbortController();
  experts.tell("Looking at the experts ...");
  const body = { model: known.model, messages: [...messages(turns.indexOf(turn)), { role: "assistant", content: turn.answer }] };
  try {
    turn.routes = await server.routes(body, stopping.signal);
    experts.show(turn.routes);
  } catch (error) {
    if (!stopping.signal.aborted) experts.tell(plain(error));
  }
}

function forgetExperts() {
  choose(null);
  experts.tell("Once there is an answer, the experts that took its tokens and the picture's patches are shown here.");
}

function choose(turn) {
  tracing?.abort();
  shown = turn;
  for (const button of document.querySelectorAll(".answer [aria-pressed]")) {
    button.setAttribute("aria-pressed", button.closest("article") === turn?.article);
  }
}

// Drawing. An article stays as long as its turn, and only what changed is drawn anew: the focus and what is being typed are kept.

function drawTurns() {
  element("welcome").hidden = turns.length > 0 || !known;
  element("messages").replaceChildren(...turns.map(turn => turn.article));
  drawButtons();
}

function drawButtons() {
  element("messages").setAttribute("aria-busy", running !== null); // hides the buttons of all turns
  element("send").hidden = running !== null;
  element("stop").hidden = running === null;
  element("send").disabled = !known || reading > 0 || nothingToSend();
  const pictures = pending.length + turns.reduce((sum, turn) => sum + turn.images.length, 0);
  element("question").placeholder = pictures === 0 ? "Ask a question" : `Ask about the ${pictures === 1 ? "picture" : "pictures"}`;
  element("new").disabled = turns.length === 0;
  for (const button of document.querySelectorAll(".edit .strong")) button.disabled = running !== null;
}

function layOut(turn) {
  const actions = make("div", "", "actions");
  turn.article = make("article");
  actions.append(makeButton("Edit", () => edit(turn), "Edit this question"));
  turn.article.append(make("div", "", "question"), actions, make("div", "", "answer"));
  drawQuestion(turn);
}

function drawQuestion(turn, words = turn.question ? make("p", turn.question) : "") {
  const images = make("div", "", "images");
  images.append(...turn.images.map(image => picture(image.url, image.name)));
  turn.article.querySelector(".question").replaceChildren(images, words);
}

function drawAnswer(turn) {
  const place = turn.article.querySelector(".answer"), actions = make("div", "", "actions");
  place.classList.toggle("waiting", turn.state === WAITING);
  place.replaceChildren(rendered(turn.answer));
  if (turn.state === WAITING) place.append(make("p", "reading ...", "quiet"));
  if (turn.state === WAITING || turn.state === WRITING) return;
  if (turn.state === DONE && !turn.answer.trim()) place.append(make("p", "The model answered with nothing.", "quiet"));
  if (turn.state === STOPPED) place.append(make("p", "stopped", "quiet"));
  if (!answered(turn)) place.append(make("p", "It got no answer, and the model does not read it again.", "quiet if-followed"));
  if (turn.shortened) place.append(make("p", "The answer reached its longest length, which the settings can raise.", "quiet"));
  if (turn.state === FAILED) place.append(make("p", turn.problem, "problem"));
  const again = makeButton(turn.state === FAILED ? "Try again" : "Regenerate", () => askAgain(turn));
  again.className = "if-last";
  actions.append(again);
  if (known.sparse && turn.answer.trim()) {
    const button = makeButton("Experts", () => { openExperts(true); showExperts(turn); }, "Show the experts of this answer");
    button.setAttribute("aria-pressed", turn === shown);
    actions.append(button);
  }
  place.append(actions);
}

// Who has scrolled up to read is left there.
function follow(turn) {
  const inSight = turn.article.getBoundingClientRect().bottom < innerHeight;
  drawAnswer(turn);
  drawButtons();
  if (inSight) turn.article.scrollIntoView({ block: "end" });
}

let drawing = null;

// At most once in a frame.
function drawSoon(turn) {
  drawing ??= requestAnimationFrame(() => {
    drawing = null;
    if (turns.includes(turn)) follow(turn);
  });
}

function edit(turn) {
  drawQuestion(turn, editor(turn));
  turn.article.querySelector("textarea").focus();
}

function editor(turn) {
  const form = make("form", "", "edit"), text = make("textarea"), row = make("div", "", "row"), ask = make("button", "Ask again", "strong");
  const cancel = () => {
    drawQuestion(turn);
    turn.article.querySelector(".actions button").focus();
  };
  text.value = turn.question;
  text.rows = Math.min(8, turn.question.split("\n").length + 1);
  text.setAttribute("aria-label", "the question, to be changed");
  text.onkeydown = event => {
    if (event.key === "Escape") cancel();
    submitOnEnter(event, form);
  };
  form.onsubmit = event => {
    event.preventDefault();
    const question = text.value.trim();
    if (running || (!question && !turn.images.length)) return;
    turn.question = question;
    turns = turns.slice(0, turns.indexOf(turn) + 1);
    cancel();
    drawTurns();
    askAgain(turn);
  };
  row.append(make("span", "What follows it is removed.", "quiet if-followed"), makeButton("Cancel", cancel), ask);
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
  drawButtons();
}

function clearPending() {
  pending = [];
  element("composer-problem").textContent = "";
  drawThumbnails();
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
  element("toggle").hidden = !known.sparse;
  if (!turns.length) {
    openExperts(known.sparse);
    forgetExperts();
  }
  drawTurns();
  element("question").focus();
}

element("key-form").onsubmit = event => {
  event.preventDefault();
  server.setKey(element("key").value.trim());
  begin();
};
element("composer").onsubmit = event => { event.preventDefault(); send(); };
element("question").onkeydown = event => submitOnEnter(event, element("composer"));
element("question").oninput = () => { fitQuestion(); drawButtons(); };
for (const example of document.querySelectorAll("#examples button")) {
  example.onclick = () => {
    element("question").value = example.textContent;
    element("question").oninput();
    element("question").focus();
  };
}
element("attach").onclick = () => element("files").click();
element("files").onchange = () => { add([...element("files").files]); element("files").value = ""; };
element("stop").onclick = () => running?.abort();
element("new").onclick = () => {
  running?.abort();
  running = null;
  turns = [];
  clearPending();
  forgetExperts();
  drawTurns();
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
document.addEventListener("keydown", event => {
  if (event.key !== "Escape" || !element("settings").open) return;
  element("settings").open = false;
  element("settings").querySelector("summary").focus();
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

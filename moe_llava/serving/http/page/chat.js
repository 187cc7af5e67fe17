// The conversation: turns, each a question with pictures and its answer. The server stores nothing, so every request has all turns.
import { element, make, makeButton, picture, rendered } from "./dom.js";
import * as experts from "./experts.js";
import { encode } from "./pictures.js";
import * as server from "./server.js";

const EXAMPLES = ["Describe the picture.", "What is on the left?", "How many things can you see?"]; // for a model that brings none
let settings = null; // of the server: the model's name and the limits
let turns = []; // {question, images, answer, state, problem, shortened, routes: null until they are shown, article}
let pending = []; // pictures to send with the next question
let reading = 0; // number of pictures that are being read
let running = null; // aborts the current answer
let tracing = null; // aborts the request for routes
let shown = null; // the turn whose experts are shown

const WAITING = "waiting", WRITING = "writing", DONE = "done", STOPPED = "stopped", FAILED = "failed";

// Return the messages of the prompt for the turn at `end`. Unanswered questions are left out.
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

// Requests

async function answer(turn) {
  const stopping = new AbortController();
  const body = { model: settings.model, messages: messages(turns.indexOf(turn)), temperature: Number(element("temperature").value) };
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
    if (turn.state === FAILED) turn.problem = describe(error);
    if (error.wrongKey) showKeyForm(error.message);
  }
  if (running !== stopping) return; // another conversation has started
  running = null;
  follow(turn);
  if (settings.sparse && turn.answer.trim()) showExperts(turn);
}

function regenerate(turn) {
  forgetExperts();
  answer(turn);
}

function describe(error) {
  if (error instanceof server.Problem) return error.message;
  console.error(error);
  return "An error occurred on this page; see the browser's console.";
}

const nothingToSend = () => !element("question").value.trim() && !pending.length;

function send() {
  const question = element("question").value.trim();
  if (!settings || running || reading || nothingToSend()) return;
  const images = pending.length + turns.filter(answered).reduce((sum, turn) => sum + turn.images.length, 0);
  if (images > settings.images) {
    const limit = settings.images === 1 ? "1 picture" : `${settings.images} pictures`;
    element("composer-problem").textContent =
      `The server accepts ${limit} in a conversation, and this would be ${images}: remove some, or start a new conversation.`;
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
  experts.showNote("Loading the experts ...");
  const body = { model: settings.model, messages: [...messages(turns.indexOf(turn)), { role: "assistant", content: turn.answer }] };
  try {
    turn.routes = await server.routes(body, stopping.signal);
    experts.show(turn.routes);
  } catch (error) {
    if (!stopping.signal.aborted) experts.showNote(describe(error));
  }
}

function forgetExperts() {
  choose(null);
  experts.showNote("After an answer, the experts of its tokens and of the picture's patches are shown here.");
}

function choose(turn) {
  tracing?.abort();
  shown = turn;
  for (const button of document.querySelectorAll(".answer [aria-pressed]")) {
    button.setAttribute("aria-pressed", button.closest("article") === turn?.article);
  }
}

// Drawing. Each turn keeps its article, and only changed parts are redrawn, so the focus and typed text are kept.

function drawTurns() {
  element("welcome").hidden = turns.length > 0 || !settings;
  element("messages").replaceChildren(...turns.map(turn => turn.article));
  drawButtons();
}

function drawButtons() {
  element("messages").setAttribute("aria-busy", running !== null); // hides the buttons of all turns
  element("send").hidden = running !== null;
  element("stop").hidden = running === null;
  element("send").disabled = !settings || reading > 0 || nothingToSend();
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
  const body = turn.article.querySelector(".answer"), actions = make("div", "", "actions");
  body.classList.toggle("waiting", turn.state === WAITING);
  body.replaceChildren(rendered(turn.answer));
  if (turn.state === WAITING) body.append(make("p", "waiting ...", "quiet"));
  if (turn.state === WAITING || turn.state === WRITING) return;
  if (turn.state === DONE && !turn.answer.trim()) body.append(make("p", "The answer is empty.", "quiet"));
  if (turn.state === STOPPED) body.append(make("p", "stopped", "quiet"));
  if (!answered(turn)) body.append(make("p", "This question has no answer and is left out of later prompts.", "quiet if-followed"));
  if (turn.shortened) body.append(make("p", "The answer reached the maximum length, which the settings can raise.", "quiet"));
  if (turn.state === FAILED) body.append(make("p", turn.problem, "problem"));
  const again = makeButton(turn.state === FAILED ? "Try again" : "Regenerate", () => regenerate(turn));
  again.className = "if-last";
  actions.append(again);
  if (settings.sparse && turn.answer.trim()) {
    const button = makeButton("Experts", () => { openExperts(true); showExperts(turn); }, "Show the experts of this answer");
    button.setAttribute("aria-pressed", turn === shown);
    actions.append(button);
  }
  body.append(actions);
}

// Scroll to the end, unless the user has scrolled up.
function follow(turn) {
  const inSight = turn.article.getBoundingClientRect().bottom < innerHeight;
  drawAnswer(turn);
  drawButtons();
  if (inSight) turn.article.scrollIntoView({ block: "end" });
}

let drawing = null;

// Redraw at most once per frame.
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
  const form = make("form", "", "edit"), text = make("textarea"), row = make("div", "", "row"), ask = make("button", "Send again", "strong");
  const cancel = () => {
    drawQuestion(turn);
    turn.article.querySelector(".actions button").focus();
  };
  text.value = turn.question;
  text.rows = Math.min(8, turn.question.split("\n").length + 1);
  text.setAttribute("aria-label", "edit the question");
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
    regenerate(turn);
  };
  row.append(make("span", "Later turns are removed.", "quiet if-followed"), makeButton("Cancel", cancel), ask);
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
      pending.push(await encode(file, settings));
    } catch (error) {
      element("composer-problem").textContent = describe(error);
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

function showKeyForm(problem) {
  element("key-form").hidden = false;
  element("key-problem").textContent = problem;
  element("key").focus();
}

function useExample(text) {
  element("question").value = text;
  element("question").oninput();
  element("question").focus();
}

async function connect() {
  try {
    settings = await server.settings();
  } catch (error) {
    element("welcome").hidden = true;
    if (error.wrongKey) showKeyForm(server.hasKey() ? error.message : "");
    else element("messages").replaceChildren(make("p", describe(error), "problem"), makeButton("Try again", connect));
    return;
  }
  element("key-form").hidden = true;
  element("model").textContent = document.title = settings.model;
  element("tokens").placeholder = settings.new_tokens;
  const examples = settings.examples.length ? settings.examples : EXAMPLES;
  element("examples").replaceChildren(...examples.map(text => makeButton(text, () => useExample(text))));
  element("toggle").hidden = !settings.sparse;
  if (!turns.length) {
    openExperts(settings.sparse);
    forgetExperts();
  }
  drawTurns();
  element("question").focus();
}

element("key-form").onsubmit = event => {
  event.preventDefault();
  server.setKey(element("key").value.trim());
  connect();
};
element("composer").onsubmit = event => { event.preventDefault(); send(); };
element("question").onkeydown = event => submitOnEnter(event, element("composer"));
element("question").oninput = () => { fitQuestion(); drawButtons(); };
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
  if (!files.length || !settings) return;
  event.preventDefault();
  add(files);
});
for (const kind of ["dragenter", "dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, event => {
    if (!event.dataTransfer?.types.includes("Files")) return;
    event.preventDefault();
    document.body.classList.toggle("dropping", kind === "dragenter" || kind === "dragover");
    if (kind === "drop" && settings) add([...event.dataTransfer.files]);
  });
}
connect();

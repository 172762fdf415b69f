// The page: a form, a picture that appears step by step, and what is known of it afterwards.

import { ApiError, fetchModel, generate, rememberKey } from "./api.js";
import { drawMap } from "./detail.js";
import { plotSchedule } from "./plot.js";
import { Strip } from "./strip.js";

const $ = (id) => document.getElementById(id);

let strip; // once the model is known
let asked; // the body of the picture that is shown
let made; // its last event, with the trace
let running = null; // the AbortController of the picture that is being made

start();

/** Fill the form with what the bundle offers. */
async function start() {
  $("form").addEventListener("submit", (event) => act(event, makePicture));
  $("key-form").addEventListener("submit", (event) => act(event, useKey));
  $("compare").addEventListener("click", (event) => act(event, compare));
  $("cancel").addEventListener("click", () => running?.abort());
  $("schedule").addEventListener("change", showChoice);
  $("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("form").requestSubmit();
  });
  $("slider").addEventListener("input", showSlider);
  $("stage").addEventListener("pointermove", dragSlider);
  $("stage").addEventListener("pointerdown", dragSlider);
  $("map-choice").addEventListener("change", showMap);
  new ResizeObserver(showPlot).observe($("plot"));
  await act(null, showModel);
}

/** Do something, and tell in one line what went wrong. A refused key is asked for anew. */
async function act(event, what) {
  event?.preventDefault();
  if (running) return; // one picture after the other
  $("error").textContent = "";
  try {
    await what();
  } catch (error) {
    if (error.name === "AbortError") return;
    if (!(error instanceof ApiError)) throw error;
    if (error.status === 401) {
      $("key-form").hidden = false;
      $("key").focus();
    }
    $("error").textContent = error.message;
  }
}

async function useKey() {
  rememberKey($("key").value);
  await showModel();
}

async function showModel() {
  const { id, ddit } = await fetchModel();
  $("key-form").hidden = true;
  const patches = ddit.levels.map(({ patch }) => patch);
  $("model").textContent = `${id}: ${ddit.family} on ${ddit.backend}, levels ${patches.join(", ")}`;
  strip = new Strip($("strip"), $("legend"), patches);
  $("prompt").maxLength = ddit.limits.prompt;
  $("steps").max = ddit.limits.steps;
  $("steps").defaultValue = ddit.steps; // shown unless the user has typed something meanwhile
  for (const side of ["width", "height"]) {
    const ranges = ddit.sizes.map((size) => size[side]);
    const unit = ddit.size.multiple_of[side];
    $(side).min = unit * Math.ceil(Math.min(...ranges.map(([low]) => low)) / unit); // steps are counted from here
    $(side).max = Math.max(...ranges.map(([, high]) => high));
    $(side).step = unit;
    $(side).defaultValue = ddit.size[side];
  }
  $("negative-row").hidden = !ddit.negative_prompt;
  const coarse = patches.some((patch) => patch > ddit.native);
  for (const option of document.querySelectorAll("option.coarse")) option.hidden = option.disabled = !coarse;
}

/** Show the field that the chosen schedule needs. */
function showChoice() {
  for (const name of ["budget", "written"]) {
    const chosen = $("schedule").value === name;
    $(`${name}-row`).hidden = !chosen;
    $(name).required = chosen;
  }
}

/** What the form asks for. */
function bodyOfForm() {
  const body = {
    prompt: $("prompt").value,
    size: `${$("width").value}x${$("height").value}`,
    steps: Number($("steps").value),
  };
  if ($("seed").value) body.seed = Number($("seed").value);
  if ($("negative").value && !$("negative-row").hidden) body.negative_prompt = $("negative").value;
  const schedule = $("schedule").value;
  if (schedule === "budget") return { ...body, budget: Number($("budget").value) };
  return { ...body, schedule: schedule === "written" ? $("written").value : schedule };
}

async function makePicture() {
  if (!strip) await showModel();
  const body = bodyOfForm();
  made = await follow({ ...body, trace: true, partial_images: 1 }, $("picture"), {
    "ddit.accepted": (event) => {
      asked = { ...body, seed: event.seed };
      clear(event.size.split("x"));
      strip.start(event.steps);
      say(`Seed ${event.seed}, ${event.steps} steps: ${event.schedule}`);
    },
    "ddit.progress": (event) => {
      strip.add(event);
      $("status").textContent = `Step ${event.step} of ${event.steps}, σ ${event.sigma.toFixed(3)}`;
    },
  });
  $("picture").alt = asked.prompt;
  showResult();
}

/** Make room for a picture that the server has accepted; a refused one leaves the last where it is. */
function clear([width, height]) {
  made = null;
  for (const id of ["result", "native", "map", "picture", "slider-row"]) $(id).hidden = true;
  $("stage").className = "";
  $("stage").style.setProperty("aspect-ratio", `${width} / ${height}`);
  $("run").style.setProperty("--width", `${width}px`);
  $("run").hidden = false;
}

/** The native picture of the same seed, beside the one that is shown. */
async function compare() {
  const { budget, ...body } = asked;
  $("native").alt = `${asked.prompt}, all steps native`;
  $("slider-row").hidden = false;
  $("slider").focus();
  showSlider();
  await follow({ ...body, schedule: "native" }, $("native"), {
    "ddit.accepted": () => say("The native picture of the same seed…"),
    "ddit.progress": ({ step, steps }) => ($("status").textContent = `Native: step ${step} of ${steps}`),
    "image_generation.completed": ({ ddit }) => {
      const ratio = ddit.denoise_milliseconds / made.ddit.denoise_milliseconds;
      say(`The native steps took ${seconds(ddit.denoise_milliseconds)}, ${ratio.toFixed(1)} × as long.`);
    },
  }).catch((error) => {
    $("native").hidden = $("slider-row").hidden = true;
    $("stage").className = "";
    throw error;
  });
  $("compare").hidden = true;
}

/** Make a picture, show it in `image` as it appears, call what is told of every event, and return the last one. */
async function follow(body, image, on) {
  running = new AbortController();
  showBusy();
  let accepted = false;
  try {
    for await (const event of generate({ ...body, output_format: "webp", output_compression: 95 }, running.signal)) {
      accepted = true;
      on[event.type]?.(event);
      if (event.preview) show(image, `data:image/jpeg;base64,${event.preview}`);
      if (event.b64_json) show(image, `data:image/webp;base64,${event.b64_json}`);
      if (event.type === "image_generation.completed") return event;
    }
    throw new ApiError(0, "the server ended the stream before the picture was done; try again");
  } catch (error) {
    if (error.name === "AbortError") say("Cancelled.");
    else if (accepted) say("Not finished.");
    throw error;
  } finally {
    running = null;
    showBusy();
  }
}

/** Buttons without a use stay where they are, so that the keyboard's focus does. */
function showBusy() {
  for (const id of ["make", "compare"]) $(id).setAttribute("aria-disabled", running !== null);
  $("cancel").setAttribute("aria-disabled", running === null);
  $("run").setAttribute("aria-busy", running !== null);
}

/** A sentence for the eyes and for screen readers; single steps are for the eyes alone. */
function say(text) {
  $("status").textContent = $("announcement").textContent = text;
}

function show(image, source) {
  image.src = source;
  image.hidden = false;
}

function showResult() {
  const { ddit, trace } = made;
  $("result").hidden = false;
  $("compare").hidden = asked.schedule === "native";
  $("download").href = $("picture").src;
  $("download").download = `ddit-${ddit.seed}.webp`;
  $("map-choice").hidden = !trace.complexity?.where.length;
  document.querySelector("#map-choice input").checked = true;
  showMap();
  showFacts(ddit);
  showPlot();
  say(`Done in ${seconds(ddit.total_milliseconds)}: ${strip.summary()}`);
}

function showFacts(ddit) {
  const facts = {
    Schedule: ddit.schedule,
    Seed: ddit.seed,
    Queue: seconds(ddit.queue_milliseconds),
    Text: seconds(ddit.encode_milliseconds),
    Steps: seconds(ddit.denoise_milliseconds),
    Decoder: seconds(ddit.decode_milliseconds),
  };
  $("facts").replaceChildren(
    ...Object.entries(facts).map(([name, value]) => {
      const row = document.createElement("div");
      const [term, text] = [document.createElement("dt"), document.createElement("dd")];
      [term.textContent, text.textContent] = [name, value];
      row.append(term, text);
      return row;
    }),
  );
}

function showPlot() {
  const width = $("plot").clientWidth;
  if (made && width) $("plot").replaceChildren(...plotSchedule(made.trace, Math.max(width, 200)));
}

function showMap() {
  const kind = document.querySelector("#map-choice input:checked").value;
  $("map").hidden = !kind;
  $("map-scale").replaceChildren();
  if (!kind) return;
  const [low, high] = drawMap($("map"), made.trace.complexity, kind);
  const bar = document.createElement("span");
  bar.className = "colours";
  $("map-scale").append(low, bar, high);
  $("map").setAttribute("aria-label", `detail map, ${kind}: ${low} to ${high}`);
}

/** The native picture covers the left part of the other, up to the slider. */
function showSlider() {
  $("stage").className = "compared";
  $("stage").style.setProperty("--cut", `${$("slider").value}%`);
  $("slider").setAttribute("aria-valuetext", `${$("slider").value} % native`);
}

function dragSlider(event) {
  if ($("slider-row").hidden || (event.type === "pointermove" && event.buttons !== 1)) return;
  const box = $("stage").getBoundingClientRect();
  $("slider").value = (100 * (event.clientX - box.left)) / box.width;
  showSlider();
}

function seconds(milliseconds) {
  return milliseconds < 1000 ? `${milliseconds.toFixed(0)} ms` : `${(milliseconds / 1000).toFixed(1)} s`;
}

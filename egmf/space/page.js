// The clip stays in the browser: the player and a second question need no file on the server, which deletes it.
const egmf = {
  fetch: window.fetch.bind(window),
  clips: new Map(), // path on the server -> the clip

  // Screen readers read out what appears there.
  announce(place) {
    document.getElementById(place).setAttribute("aria-live", "polite");
  },

  player() {
    return [...document.querySelectorAll("#video video, #sound audio")].find((one) => one.offsetParent && one.src);
  },

  // "Answer" waits for a clip on its way to the server: without it, there would be nothing to answer.
  setSending(isSending) {
    document.getElementById("ask").disabled = isSending;
  },

  async keep(value, place) {
    egmf.setSending(false);
    if (!value) return;
    const answer = await fetch(value.url);
    if (!answer.ok) return;
    const clip = { blob: await answer.blob(), name: value.orig_name || "clip" };
    egmf.clips.set(value.path, clip);
    for (let tries = 0; tries < 100; tries++) {
      const player = document.querySelector(`#${place} video[src], #${place} audio[src]`);
      if (player) return egmf.play(player, clip.blob);
      await new Promise((done) => setTimeout(done, 50));
    }
  },

  play(player, blob) {
    player.addEventListener("loadedmetadata", () => {
      if (player.duration !== Infinity) return;
      player.addEventListener("durationchange", () => (player.currentTime = 0), { once: true });
      player.currentTime = 1e9; // a recorded clip states no length: the browser finds it when it looks for the end
    }, { once: true });
    player.addEventListener("timeupdate", () => {
      for (const one of document.querySelectorAll(".egmf-timeline button")) {
        const isNow = one.dataset.start <= player.currentTime && player.currentTime < one.dataset.end;
        one.setAttribute("aria-current", isNow);
      }
    });
    player.src = URL.createObjectURL(blob);
  },

  // Sends a clip again that the server has deleted.
  async send(value) {
    const clip = value && egmf.clips.get(value.path);
    if (!clip || (await fetch(value.url, { method: "HEAD" })).ok) return value;
    const form = new FormData();
    form.append("files", clip.blob, clip.name);
    const [url] = value.url.split("/file=");
    const answer = await egmf.fetch(`${url}/upload`, { method: "POST", body: form });
    if (!answer.ok) return value;
    const [path] = await answer.json();
    return { ...value, path, url: `${url}/file=${path}` };
  },
};

// Gradio has no event for the begin of an upload, but sends all of them with `fetch`.
window.fetch = (...request) => {
  const sent = egmf.fetch(...request);
  if (!new URL(request[0], location.href).pathname.endsWith("/upload")) return sent;
  egmf.setSending(true); // until `keep` has the clip
  sent.then((answer) => answer.ok || egmf.setSending(false), () => egmf.setSending(false));
  return sent;
};

document.addEventListener("click", (event) => {
  const segment = event.target.closest?.(".egmf-timeline button");
  const player = segment && egmf.player();
  if (!player) return;
  player.currentTime = Number(segment.dataset.start);
  player.play();
});

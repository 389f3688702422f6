"use strict";
// Filters of the gallery. Values of the page are only compared as text, never made into markup.
(() => {
  const form = document.getElementById("filters");
  if (!form) return;
  const questions = Array.from(document.querySelectorAll("article"));
  const status = document.getElementById("shown");
  const names = ["model", "view", "verdict", "kind"];
  const value = (name) => (form.elements.namedItem(name) || { value: "" }).value;

  const apply = () => {
    const policy = value("policy");
    const words = value("text").trim().toLowerCase();
    let shown = 0;
    let answers = 0;
    for (const question of questions) {
      let left = 0;
      for (const answer of question.querySelectorAll(".answer")) {
        const fits = names.every((name) => !value(name) || answer.dataset[name] === value(name));
        answer.hidden = !fits;
        left += fits ? 1 : 0;
      }
      const fits =
        left > 0 &&
        (!policy || question.dataset.policy === policy) &&
        (!words || question.textContent.toLowerCase().includes(words));
      question.hidden = !fits;
      shown += fits ? 1 : 0;
      answers += fits ? left : 0;
    }
    status.textContent = `${shown} of ${questions.length} questions, ${answers} answers`;
  };

  form.hidden = false;
  form.addEventListener("input", apply);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(apply));
  document.getElementById("open").addEventListener("click", () => {
    for (const answer of document.querySelectorAll(".answer:not([hidden])")) answer.open = true;
  });
  addEventListener("beforeprint", () => {
    for (const answer of document.querySelectorAll(".answer:not([hidden])")) answer.open = true;
  });
  apply();
})();

#include "runtime/session.h"

#include "bindings/bindings.h"

namespace py = pybind11;

namespace gemloupe {

void BindSession(py::module_& module) {
  py::class_<SamplingOptions>(module, "SamplingOptions")
      .def(py::init<>())
      .def_readwrite("temperature", &SamplingOptions::temperature)
      .def_readwrite("top_k", &SamplingOptions::top_k)
      .def_readwrite("top_p", &SamplingOptions::top_p)
      .def_readwrite("min_p", &SamplingOptions::min_p)
      .def_readwrite("repetition_penalty", &SamplingOptions::repetition_penalty)
      .def_readwrite("seed", &SamplingOptions::seed)
      .def_readwrite("suppress", &SamplingOptions::suppress);

  py::class_<TokenMask, std::shared_ptr<TokenMask>>(
      module, "TokenMask",
      "Which ids the next token of one row may be. Each of allow, allow_all and fail serves one "
      "token, and may be called by another thread while the session steps.")
      .def(py::init<int64_t>(), py::arg("vocab_size"))
      .def_property_readonly(
          "words",
          [](const py::object& self) {
            std::vector<uint32_t>& words = self.cast<TokenMask&>().words();
            return py::array_t<uint32_t>(static_cast<py::ssize_t>(words.size()), words.data(),
                                         self);
          },
          "Writable uint32 [V / 32], 32 ids each, the lowest bit first.")
      .def("allow", &TokenMask::Allow, "Only the ids whose bit is set in `words`.")
      .def("allow_all", &TokenMask::AllowAll)
      .def("fail", &TokenMask::Fail, py::arg("reason"), "The step raises ValueError.");

  py::class_<RowRequest>(module, "RowRequest", "One sequence to be continued.")
      .def(py::init<>())
      .def_readwrite("ids", &RowRequest::ids)
      .def_readwrite("cache", &RowRequest::cache)
      .def_readwrite("max_new_tokens", &RowRequest::max_new_tokens)
      .def_readwrite("sampling", &RowRequest::sampling)
      .def_readwrite("stop_ids", &RowRequest::stop_ids)
      .def_readwrite("logprobs", &RowRequest::logprobs,
                     "Alternatives to report; -1 for none at all.")
      .def_readwrite("prompt_logprobs", &RowRequest::prompt_logprobs)
      .def_readwrite("softcap", &RowRequest::softcap, "None: the config's.")
      .def_readwrite("mask", &RowRequest::mask, "A TokenMask that is asked for every token.")
      .def_readwrite("hooks", &RowRequest::hooks, "Captures and edits of this row, or None.")
      .def_readwrite("cuts", &RowRequest::cuts, "Counts of ids at which a pass ends, ascending.")
      .def_readwrite("drafter", &RowRequest::drafter, "A Drafter of this model, or None.")
      .def_readwrite("draft_tokens", &RowRequest::draft_tokens, "Most guesses of a pass.")
      .def_readwrite(
          "lookup_ngram", &RowRequest::lookup_ngram,
          "Guesses follow the last tokens, at most so many, of an earlier place; 0: none.")
      .def_property(
          "adapters", nullptr,
          [](RowRequest& request, const PyAdapterMix& adapters) {
            request.adapters = UseAdapters(adapters);
          },
          "[(adapter, weight)] of this row.")
      .def_property(
          "media", [](const RowRequest& request) { return request.media != nullptr; },
          [](RowRequest& request, const std::shared_ptr<MediaInput>& media) {
            request.media = media;
          },
          "Soft tokens of the ids, or None.");

  py::class_<TokenLogprobs>(module, "TokenLogprobs")
      .def_readonly("logprob", &TokenLogprobs::logprob)
      .def_readonly("top", &TokenLogprobs::top, "[(id, logprob)], descending.");

  py::class_<StepResult>(module, "StepResult", "What one step did to one row.")
      .def_readonly("row", &StepResult::row)
      .def_readonly("token", &StepResult::token, "-1: a chunk of the prompt was read.")
      .def_readonly("prefilled", &StepResult::prefilled)
      .def_readonly("finish_reason", &StepResult::finish_reason,
                    "\"\", \"stop\", \"length\" or \"error\".")
      .def_readonly("error", &StepResult::error, "Why the row can't go on; \"\" where it can.")
      .def_readonly("logprobs", &StepResult::logprobs)
      .def_readonly("prompt_logprobs", &StepResult::prompt_logprobs);

  py::class_<Session>(module, "Session", "Generates for many rows at once.")
      .def(py::init<std::shared_ptr<TextModel>, int64_t>(), py::arg("model"),
           py::arg("chunk") = kDefaultChunk)
      .def(
          "submit",
          [](Session& session, const RowRequest& request) {
            return ValueOrThrow(WithoutGil([&] { return session.Submit(request); }));
          },
          py::arg("request"), "Adds a row and returns its number.")
      .def(
          "step",
          [](Session& session) {
            SignalCheck stopped;
            return ValueOrThrow(
                WithoutGil([&] { return session.Step([&] { return stopped(); }); }));
          },
          "Runs one pass: a chunk of a prompt, or one token of each row.")
      .def(
          "drafts",
          [](const Session& session, int row) {
            const DraftCounts counts =
                ValueOrThrow(WithoutGil([&] { return session.Drafts(row); }));
            return py::make_tuple(counts.passes, counts.drafted, counts.accepted);
          },
          py::arg("row"), "(passes that checked guesses, guesses, those that were right).")
      .def(
          "cancel",
          [](Session& session, int row) {
            ThrowIfError(WithoutGil([&] { return session.Cancel(row); }));
          },
          py::arg("row"))
      .def(
          "rollback",
          [](Session& session, int row) {
            ThrowIfError(WithoutGil([&] { return session.Rollback(row); }));
          },
          py::arg("row"), "Ends a row and gives its cache the content it was submitted with.")
      .def(
          "release",
          [](Session& session, int row) {
            ThrowIfError(WithoutGil([&] { return session.Release(row); }));
          },
          py::arg("row"), "Ends a row and frees what it holds; a later row may get its number.")
      .def(
          "cache",
          [](const Session& session, int row) {
            return ValueOrThrow(WithoutGil([&] { return session.Cache(row); }));
          },
          py::arg("row"))
      .def_property_readonly(
          "active",
          [](const Session& session) { return WithoutGil([&] { return session.active(); }); },
          "Rows that are not finished.");
}

}  // namespace gemloupe

// Where things are in `stft_bands`: frames in the signal, reflections at its ends, bins in the band tensors.
// One source for the host and the device.
#pragma once

#include <cstdint>

#include "fft.h"
#include "half.h"

namespace dac {

constexpr int kMaxWindows = 8, kMaxBands = 8;
// Of one signal. Beyond, the reflection at its end, 2 (samples - 1), is no int.
constexpr int kMaxSamples = 1 << 30;

// Bins [low, high) of a spectrum and their tensor [B, 2, frames, high - low]; no tensor where no band wants them.
struct Segment {
  int low, high;
  void* data;
};

// One window's spectrogram: frame t covers the positions start(t) .. start(t) + size - 1. A position outside the
// signal's [0, samples) holds its reflection.
struct Spectrogram {
  int samples, size, hop, pad, frames, segments;
  Segment segment[2 * kMaxBands + 1];  // From bin 0 to bin size / 2, without gaps.

  DAC_HD int start(int frame) const { return frame * hop - pad; }
};

struct Plan {
  int64_t batch;
  int windows;
  bool channels_last;
  Spectrogram window[kMaxWindows];
};

struct Range {
  int begin, end;
};

DAC_HD int lesser(int a, int b) { return a < b ? a : b; }
DAC_HD int greater(int a, int b) { return a < b ? b : a; }
DAC_HD Range common(Range a, Range b) { return {greater(a.begin, b.begin), lesser(a.end, b.end)}; }

// The sample that a position holds.
DAC_HD int reflect(int position, int samples) {
  position = position < 0 ? -position : position;
  return lesser(position, 2 * (samples - 1) - position);
}

// The three ways from samples to the positions that hold them: position = shift + sign sample, for the positions
// in the range.
struct Image {
  int sign, shift;
  Range positions;

  // Positions to samples and back: the map is its own inverse's shape.
  DAC_HD Range map(Range samples) const {
    if (sign > 0) return samples;
    return {shift - samples.end + 1, shift - samples.begin + 1};
  }
};

constexpr int kImages = 3;

DAC_HD Image image(const Spectrogram& s, int which) {
  if (which == 0) return {1, 0, {0, s.samples}};
  if (which == 1) return {-1, 0, {-s.pad, 0}};
  return {-1, 2 * (s.samples - 1), {s.samples, s.frames * s.hop + s.pad}};
}

// The frames that some sample of the span touches, directly or by reflection.
DAC_HD Range frames_over(const Spectrogram& s, Range span) {
  int first = s.samples + s.pad, last = -s.pad;
  for (int which = 0; which < kImages; ++which) {
    const Image way = image(s, which);
    const Range held = common(way.map(span), way.positions);
    if (held.begin >= held.end) continue;
    first = lesser(first, held.begin);
    last = greater(last, held.end - 1);
  }
  const int after = first + s.pad - s.size;
  return {after < 0 ? 0 : after / s.hop + 1, lesser(s.frames, (last + s.pad) / s.hop + 1)};
}

// The samples of the span that some position covered by those frames holds, by one of the three ways.
DAC_HD Range samples_under(const Spectrogram& s, const Image& way, Range frames, Range span) {
  const Range covered = common({s.start(frames.begin), s.start(frames.end - 1) + s.size}, way.positions);
  return common(way.map(covered), span);
}

// Sum of what those of the frames that cover a position have there; value(f, n) is sample n of frame frames.begin + f.
template <class S, class Value>
DAC_HD S overlap(const Spectrogram& s, int position, Range frames, const Value& value) {
  const int offset = position + s.pad, newest = offset / s.hop;
  const Range covering = common({newest - 3, newest + 1}, frames);
  S total = 0;
  for (int t = covering.begin; t < covering.end; ++t) total += value(t - frames.begin, offset - t * s.hop);
  return total;
}

// Where a segment's tensor has its bin `low` of one frame's real (part 0) or imaginary part (part 1). Neighbouring
// bins are 1 element apart, channels last 2.
DAC_HD int64_t row_offset(const Spectrogram& s, const Segment& segment, bool channels_last, int64_t item, int frame,
                          int part) {
  // There are fewer than 2^31 rows.
  const int width = segment.high - segment.low, row = static_cast<int>(item) * s.frames + frame;
  if (channels_last) return static_cast<int64_t>(row) * (2 * width) + part;
  return static_cast<int64_t>(row + (static_cast<int>(item) + part) * s.frames) * width;
}

}  // namespace dac

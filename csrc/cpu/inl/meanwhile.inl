// What else there is to do while a tile is multiplied. Included inside an anonymous namespace.
// A Meanwhile is called before every 32 elements of depth. What it returns hears of each word of them by step(), so that the work goes in
// between FMAs, and of their end by done(); it is a copy, so that its state stays in registers.
#pragma once

struct Nothing {
  Nothing operator()() const { return {}; }
  void step() const {}
  void done() const {}
};

// The gradients of x, of the weights and of the biases, computed as products over the rows of a
// block of steps. A row is one sequence at one step.
#pragma once

#include "cpu/drivers/history.h"
#include "cpu/drivers/weights.h"

namespace rnnfast::cpu {

// A ring buffer of rows, one per sequence for each of the last `slots` steps.
struct StepRows {
  Rows rows;
  int64_t slots = 0, batch = 0;

  static StepRows take(Arena& arena, int64_t slots, int64_t batch, int64_t bytes) {
    return {{arena.take<char>(slots * batch * bytes), bytes}, slots, batch};
  }
  char* operator()(int64_t step, int64_t b) const { return rows[step % slots * batch + b]; }
  char* operator()(BlockRow row) const { return (*this)(row.step, row.b); }
};

// A block of steps and the rows that are active in it.
struct Block {
  Span steps;
  const BlockRow* rows;
  int64_t count;

  bool is_first() const { return steps.begin == 0; }
};

class BlockProducts {
 public:
  // The inputs are left by the steps of the backward: gate gradients (E) and, if h is projected,
  // the gradient of h (E) and the h that the cells computed before the projection (S).
  BlockProducts(const Context& context, const BackwardArgs& args, const Plan& plan,
                const History& history, const StepRows& d_gates, const StepRows& d_h,
                const StepRows& unprojected, Arena& arena);

  void pack(const Team& team);
  // All threads call this; it has a barrier inside if gradients of weights are wanted.
  void run(const Block& block, const Team& team) const;

 private:
  // The lhs of products that sum over the rows of a block: lhs rows [element][row of the block].
  struct Transposed {
    Rows rows;
    const WeightFormat* format = nullptr;
    Transposed from(int64_t element) const { return {{rows[element], rows.pitch}, format}; }
  };
  // One weight gradient, A (count * height, columns.N()). Its row place[j] * height + i is the sum,
  // over the rows of a block, of lhs element j * height + i times the rhs row.
  struct WeightGrad {
    void* grad;
    int count;
    const int* place;
    int64_t height;
    const Columns& columns;
  };
  Transposed take_transposed(Arena& arena, int64_t elements, int64_t rows,
                             const WeightFormat& format) const;

  void pack_w_ih(int64_t panel, char* to) const;
  bool gates_in_order() const;
  void grad_input(const Block& block, const Team& team) const;
  void grad_parameters(const Block& block, const Team& team) const;
  void grad_table(const Block& block, const Team& team) const;
  template <class Sums>
  void grad_vectors(const Block& block, Span own, Sums&& sums) const;
  template <class Lhs, class Rhs>
  void sum_few(const Block& block, const Team& team, Lhs&& lhs, Rhs&& rhs, int64_t first_element,
               const WeightGrad& grad) const;
  template <class Source>
  void transpose(const Block& block, Span own, Source&& source, const Transposed& to) const;
  template <class Source>
  void pack_rows(const Block& block, const Team& team, const Columns& columns, Source&& source,
                 char* to) const;
  void accumulate(const Block& block, const Team& team, const Transposed& lhs, const char* packed,
                  const WeightGrad& grad) const;
  void outer_product(const Transposed& lhs, int64_t rows, int64_t depth, const char* packed,
                     const Columns& columns, Span panels, bool add, char* to) const;
  void fetch_tile(const char* to, int rows, const Columns& columns, int64_t panel) const;
  Span share_vectors(const Team& team, int64_t elements) const;

  WeightGrad grad_of_w_ih() const;
  WeightGrad grad_of_w_hh() const;
  WeightGrad grad_of_w_hr() const;

  const Context& context_;
  const BackwardArgs& args_;
  const History& history_;
  const StepRows &d_gates_, &d_h_, &unprojected_;
  const int64_t hidden_element_;  // first element of a row of d_gates that belongs to W_hh
  const Columns hidden_, input_, units_;
  const bool panelwise_;  // each thread packs one panel of W_ih at a time
  // Packed columns [panel, or thread][G*H] of W_ih, its rows in the order of d_gates.
  char* w_ih_ = nullptr;
  Transposed lhs_;        // gradients of gates and parameters [(D + N)*H]
  Rows lhs_rows_;  // gate gradients as lhs rows [row of a block] for grad_x, if the format converts
  char *x_ = nullptr, *h_ = nullptr;  // packed columns of x and h, over the rows of a block
  Transposed projection_lhs_;  // gradient of h [P]
  char* packed_unprojected_ = nullptr;  // packed columns of unprojected_, over the rows of a block
};

}  // namespace rnnfast::cpu

// Includes every cell of the table in common.h.
#pragma once

#include "cells/elman.h"
#include "cells/gru.h"
#include "cells/half.h"
#include "cells/lstm.h"

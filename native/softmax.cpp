#include "softmax.hpp"
#include <cmath>
#include <vector>
namespace respike {
template <class T> void softmax(Level, int, const SoftmaxJob<T>* jobs, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) { const auto& j = jobs[i];
    for (std::int64_t t = 0; t < j.tokens; ++t) for (std::int64_t h = 0; h < j.heads; ++h) {
      std::vector<double> s; std::vector<const T*> vs; const std::int64_t p = j.start + t;
      auto dot=[&](const T* q,const T* k){double d=0;for(std::int64_t c=0;c<j.head_dim;++c)d+=double(load(q+c))*load(k+c);return d*j.scale;};
      for (std::int64_t c=0;c<j.sinks.count;++c) if (c<=p){ s.push_back(dot(j.q_sink+t*j.q_stride+h*j.head_dim, j.sinks.k+c*j.sinks.stride)); vs.push_back(j.sinks.v+c*j.sinks.stride);}
      for (std::int64_t c=0;c<j.keys.count;++c){ auto pos=j.first+c; if(pos<=p && p-pos<j.window){ s.push_back(dot(j.q+t*j.q_stride+h*j.head_dim, j.keys.k+c*j.keys.stride)); vs.push_back(j.keys.v+c*j.keys.stride);} }
      double m=-1e300,z=0; for(double a:s)m=std::max(m,a); for(double a:s)z+=std::exp(a-m);
      for(std::int64_t c=0;c<j.value_dim;++c){double o=0;for(size_t x=0;x<s.size();++x)o+=std::exp(s[x]-m)/z*load(vs[x]+c); store(j.out+t*j.out_stride+h*j.value_dim+c,float(o));}
      if(j.log_mass) j.log_mass[t*j.mass_stride+h]=float(std::log(z)+m);
    } } }
template void softmax(Level,int,const SoftmaxJob<float>*,std::int64_t);
template void softmax(Level,int,const SoftmaxJob<bf16>*,std::int64_t);
}
